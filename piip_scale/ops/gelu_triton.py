"""The backward pass of GELU as a Triton kernel that sums what it writes: the gradient of the bias added before it."""

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
from torch.nn import functional

from piip_scale.ops import fused
from piip_scale.ops.activation_triton import before_activation
from piip_scale.ops.column_sums_triton import join_sums
from piip_scale.ops.group_norm import ACTIVATIONS

_BLOCK_ROWS, _BLOCK_WIDTH = 4, 256
"""A tile of 8 elements a thread, a load of 16 bytes in half precision; the derivative of GELU takes registers."""
_TILES = 8
"""Tiles of rows that one program adds up: rows of the partial sums are written 32 times less."""


def gelu_of_biased_triton(hidden: Tensor, bias_C: Tensor) -> Tensor:
    """``gelu(hidden)``, exact, of a sum that holds the bias already: its gradient goes to both.

    Args:
        hidden: (..., C), with the bias added.
        bias_C: The bias.

    Returns:
        Of the same shape.
    """
    output: Tensor = _GeluOfBiased.apply(hidden, bias_C)
    return output


class _GeluOfBiased(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        ctx.save_for_backward(hidden)
        ctx.bias_dtype = bias.dtype
        # One kernel already.
        return functional.gelu(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        (hidden,) = ctx.saved_tensors
        grad = grad.contiguous()
        grad_hidden = torch.empty_like(hidden)
        width = hidden.shape[-1]
        rows = hidden.numel() // width
        programs = triton.cdiv(rows, _BLOCK_ROWS * _TILES)
        partial = grad.new_empty(programs, width, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grid, constants = (programs, triton.cdiv(width, _BLOCK_WIDTH)), layout(width, partial is not None)
        fused.launch(_backward_kernel, grid, hidden, grad, grad_hidden, partial, rows, **constants)
        return grad_hidden, None if partial is None else join_sums(partial, ctx.bias_dtype)


def layout(width: int, sums: bool) -> dict[str, int]:
    """What the kernel is compiled for: a width known at compile time lets rows be read in wide loads."""
    return {
        "WIDTH": width,
        "SUMS": int(sums),
        "ACTIVATION": ACTIVATIONS.index("gelu"),
        "BLOCK_ROWS": _BLOCK_ROWS,
        "BLOCK_WIDTH": _BLOCK_WIDTH,
        "TILES": _TILES,
    }


@triton.jit
def _backward_kernel(
    hidden,
    grad,
    grad_hidden,
    partial,
    num_rows,
    WIDTH: tl.constexpr,
    SUMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = columns < WIDTH
    sums = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    for tile in range(TILES):
        rows = (tl.program_id(0) * TILES + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        keep = (rows < num_rows)[:, None] & inside[None, :]
        place = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        y = tl.load(hidden + place, mask=keep, other=0.0).to(tl.float32)
        own = tl.load(grad + place, mask=keep, other=0.0).to(tl.float32)
        own = before_activation(own, y, ACTIVATION)
        sums += own
        tl.store(grad_hidden + place, own.to(grad_hidden.dtype.element_ty), mask=keep)
    if SUMS:
        tl.store(partial + tl.program_id(0).to(tl.int64) * WIDTH + columns, tl.sum(sums, axis=0), mask=inside)
