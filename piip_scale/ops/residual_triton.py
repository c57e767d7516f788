"""``ops.residual.add_residual`` as Triton kernels: each tensor is read once and written once, computed in float32."""

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
from piip_scale.ops.residual import Paths

_BLOCK_ROWS, _BLOCK_WIDTH = 8, 256
"""A tile of 16 elements a thread: loads of 16 bytes in half precision."""
_TILES = 4
"""Tiles of rows that one program of the backward pass adds up: rows of the partial sums are written 32 times less."""
_ALL, _MASKED, _INDEXED = 0, 1, 2


def add_residual_triton(x: Tensor, residual: Tensor, gamma_C: Tensor | None, paths: Paths | None) -> Tensor:
    """``ops.residual.add_residual`` on a CUDA device, or anywhere under ``TRITON_INTERPRET=1``."""
    mode, chosen, share = _ALL, None, 1.0
    if paths is not None:
        mode = _MASKED if paths.index_K is None else _INDEXED
        chosen, share = (paths.mask_B if paths.index_K is None else paths.index_K), float(paths.share)
    output: Tensor = _AddResidual.apply(x, residual, gamma_C, chosen, mode, 1 / share)
    return output


class _AddResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, gamma: Tensor | None, chosen: Tensor | None, mode: int, factor: float
    ) -> Tensor:
        x, residual = x.contiguous(), residual.contiguous()
        # Without gamma's gradient the residual is not needed again.
        ctx.save_for_backward(residual if ctx.needs_input_grad[2] else None, gamma, chosen)
        ctx.mode, ctx.factor, ctx.shape = mode, factor, residual.shape
        output = torch.empty_like(x)
        width = x.shape[-1]
        rows = x.numel() // width
        grid = (triton.cdiv(rows, _BLOCK_ROWS), triton.cdiv(width, _BLOCK_WIDTH))
        sizes = (rows, rows // x.shape[0], residual.shape[0], factor)
        constants = layout(width, mode, gamma is not None)
        fused.launch(_forward_kernel, grid, x, residual, gamma, chosen, output, *sizes, **constants)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        residual, gamma, chosen = ctx.saved_tensors
        grad = grad.contiguous()
        grad_residual = grad.new_empty(ctx.shape)
        width = grad.shape[-1]
        rows = grad_residual.numel() // width
        programs = triton.cdiv(rows, _BLOCK_ROWS * _TILES)
        partial = grad.new_empty(programs, width, dtype=torch.float32) if residual is not None else None
        grid = (programs, triton.cdiv(width, _BLOCK_WIDTH))
        sizes = (rows, rows // ctx.shape[0], ctx.factor)
        constants = layout(width, ctx.mode, gamma is not None) | {"TILES": _TILES, "SUMS": residual is not None}
        fused.launch(_backward_kernel, grid, grad, residual, gamma, chosen, grad_residual, partial, *sizes, **constants)
        grad_gamma = None if partial is None else join_sums(partial, gamma.dtype)
        return grad, grad_residual, grad_gamma, None, None, None


def layout(width: int, mode: int, scaled: bool) -> dict[str, int]:
    """What kernels are compiled for: a width known at compile time lets rows be read in wide loads."""
    return {
        "WIDTH": width,
        "MODE": mode,
        "SCALED": int(scaled),
        "BLOCK_ROWS": _BLOCK_ROWS,
        "BLOCK_WIDTH": _BLOCK_WIDTH,
    }


@triton.jit
def _forward_kernel(
    x,
    residual,
    gamma,
    chosen,
    output,
    num_rows,
    rows_of_sample,
    num_kept,
    factor,
    WIDTH: tl.constexpr,
    MODE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_KEPT: tl.constexpr = 16,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    known, inside = rows < num_rows, columns < WIDTH
    sample = rows // rows_of_sample
    source, share = rows, tl.full((BLOCK_ROWS,), factor, tl.float32)
    if MODE == 1:
        share = factor * tl.load(chosen + sample, mask=known, other=0.0).to(tl.float32)
    if MODE == 2:
        # Where this sample's residual stands among those computed; a micro-batch is a handful of samples.
        place = tl.full((BLOCK_ROWS,), -1, tl.int32)
        for first in range(0, num_kept, BLOCK_KEPT):
            places = first + tl.arange(0, BLOCK_KEPT)
            kept = tl.load(chosen + places, mask=places < num_kept, other=-1)
            found = kept[None, :] == sample[:, None]
            place = tl.maximum(place, tl.max(tl.where(found, places[None, :], -1), axis=1))
        share = tl.where(place >= 0, share, 0.0)
        source = place * rows_of_sample + rows % rows_of_sample
    keep = known[:, None] & inside[None, :]
    own = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    theirs = source.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    # What a dropped sample would add is not even read.
    added = tl.load(residual + theirs, mask=keep & (share != 0)[:, None], other=0.0).to(tl.float32)
    if SCALED:
        added *= tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.load(x + own, mask=keep, other=0.0).to(tl.float32) + share[:, None] * added
    tl.store(output + own, total.to(output.dtype.element_ty), mask=keep)


@triton.jit
def _backward_kernel(
    grad,
    residual,
    gamma,
    chosen,
    grad_residual,
    partial,
    num_rows,
    rows_of_sample,
    factor,
    WIDTH: tl.constexpr,
    MODE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    SUMS: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = columns < WIDTH
    scale = tl.full((BLOCK_WIDTH,), 1.0, tl.float32)
    if SCALED:
        scale = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    for tile in range(TILES):
        rows = (tl.program_id(0) * TILES + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        known = rows < num_rows
        sample = rows // rows_of_sample
        source, share = rows, tl.full((BLOCK_ROWS,), factor, tl.float32)
        if MODE == 1:
            share = factor * tl.load(chosen + sample, mask=known, other=0.0).to(tl.float32)
        if MODE == 2:
            kept = tl.load(chosen + sample, mask=known, other=0)
            source = kept * rows_of_sample + rows % rows_of_sample
        keep = known[:, None] & inside[None, :]
        own = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        theirs = source.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        taken = keep & (share != 0)[:, None]
        shared = share[:, None] * tl.load(grad + theirs, mask=taken, other=0.0).to(tl.float32)
        if SUMS:
            sums += shared * tl.load(residual + own, mask=taken, other=0.0).to(tl.float32)
        tl.store(grad_residual + own, (shared * scale[None, :]).to(grad_residual.dtype.element_ty), mask=keep)
    if SUMS:
        tl.store(partial + tl.program_id(0).to(tl.int64) * WIDTH + columns, tl.sum(sums, axis=0), mask=inside)
