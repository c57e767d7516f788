"""``ops.qk_norm.qk_rms_norm`` as Triton kernels, a row a time, computed in float32."""

# Annotations of a kernel's arguments are instructions to Triton, so most have none.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from piip_scale.ops import fused
from piip_scale.ops.column_sums_triton import join_sums

_ELEMENTS_A_THREAD = 16
"""Two loads of 16 bytes in half precision; more warps take wider rows, or the backward pass would not fit registers."""
_WARP, _FEWEST_WARPS, _MOST_WARPS = 32, 4, 16
_ROWS = 8
"""Rows that one program of the backward pass adds up: rows of the partial sums are written 8 times less. More would
leave multiprocessors without a program at 1,025 tokens."""


def qk_rms_norm_triton(
    qkv_BLC: Tensor, query_gamma_C: Tensor, key_gamma_C: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.qk_norm.qk_rms_norm`` on a CUDA device, or anywhere under ``TRITON_INTERPRET=1``."""
    query, key, value = _QkNorm.apply(qkv_BLC, query_gamma_C, key_gamma_C, eps)
    return query, key, value


class _QkNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, query_gamma: Tensor, key_gamma: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = qkv.contiguous()
        width = query_gamma.shape[0]
        rows = qkv.numel() // (3 * width)
        query, key = (qkv.new_empty(*qkv.shape[:-1], width) for _ in range(2))
        rstd = qkv.new_empty(2, rows, dtype=torch.float32)
        ctx.save_for_backward(qkv, query_gamma, key_gamma, rstd)
        tensors = (qkv, query_gamma, key_gamma, query, key, rstd)
        fused.launch(_forward_kernel, (rows, 2), *tensors, rows, eps, **layout(width))
        return query, key, qkv[..., 2 * width :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, query_gamma, key_gamma, rstd = ctx.saved_tensors
        grads = tuple(grad.contiguous() for grad in grads)
        width, rows = query_gamma.shape[0], rstd.shape[1]
        programs = triton.cdiv(rows, _ROWS)
        grad_qkv, sums = torch.empty_like(qkv), any(ctx.needs_input_grad[1:3])
        partial = qkv.new_empty(programs, 2 * width, dtype=torch.float32) if sums else None
        tensors = (qkv, query_gamma, key_gamma, rstd, *grads, grad_qkv, partial)
        constants = layout(width) | {"ROWS": _ROWS, "SUMS": int(sums)}
        fused.launch(_backward_kernel, (programs, 3), *tensors, rows, **constants)
        if partial is None:
            return grad_qkv, None, None, None
        grad_query_gamma, grad_key_gamma = join_sums(partial, query_gamma.dtype).split(width)
        return grad_qkv, grad_query_gamma, grad_key_gamma, None


def layout(width: int) -> dict[str, int]:
    """What kernels are compiled for: a width known at compile time lets rows be read in wide loads."""
    block = triton.next_power_of_2(width)
    warps = min(_MOST_WARPS, max(_FEWEST_WARPS, block // (_ELEMENTS_A_THREAD * _WARP)))
    return {"WIDTH": width, "BLOCK_WIDTH": block, "num_warps": warps}


@triton.jit
def _forward_kernel(
    qkv,
    query_gamma,
    key_gamma,
    query,
    key,
    rstd,
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = columns < WIDTH
    x = tl.load(qkv + (3 * row + part) * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    tl.store(rstd + part * num_rows + row, scale)
    gamma, output = query_gamma, query
    if part == 1:
        gamma, output = key_gamma, key
    y = x * scale * tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * WIDTH + columns, y.to(query.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    qkv,
    query_gamma,
    key_gamma,
    rstd,
    grad_query,
    grad_key,
    grad_value,
    grad_qkv,
    partial,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
):
    first, part = tl.program_id(0) * ROWS, tl.program_id(1)
    last = tl.minimum(first + ROWS, num_rows)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = columns < WIDTH
    if part == 2:
        for index in range(first, last):
            row = tl.cast(index, tl.int64)
            grad = tl.load(grad_value + row * WIDTH + columns, mask=inside, other=0.0)
            tl.store(grad_qkv + (3 * row + 2) * WIDTH + columns, grad, mask=inside)
    else:
        gamma, grad_output = query_gamma, grad_query
        if part == 1:
            gamma, grad_output = key_gamma, grad_key
        weight = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
        sums = tl.zeros((BLOCK_WIDTH,), dtype=tl.float32)
        for index in range(first, last):
            row = tl.cast(index, tl.int64)
            place = (3 * row + part) * WIDTH + columns
            scale = tl.load(rstd + part * num_rows + row)
            normed = scale * tl.load(qkv + place, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_output + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
            if SUMS:
                sums += grad * normed
            grad *= weight
            shared = tl.sum(grad * normed, axis=0) / WIDTH
            own = scale * (grad - normed * shared)
            tl.store(grad_qkv + place, own.to(grad_qkv.dtype.element_ty), mask=inside)
        if SUMS:
            tl.store(partial + (tl.program_id(0).to(tl.int64) * 2 + part) * WIDTH + columns, sums, mask=inside)
