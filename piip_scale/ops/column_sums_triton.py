"""Sums of columns as Triton kernels leave them: a row of partial sums a program, here joined into one row."""

# Annotations of a kernel's arguments are instructions to Triton, so most have none.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from piip_scale.ops import fused

_BLOCK_PARTS, _BLOCK_WIDTH = 32, 64
"""A tile of 16 numbers a thread; narrow, since partial sums have few columns to keep a GPU's multiprocessors busy."""


def join_sums(partial_PC: Tensor, dtype: torch.dtype) -> Tensor:
    """``partial.sum(0)`` rounded once, by one kernel, in an order that is the same from run to run.

    Args:
        partial_PC: float32 (parts, C), contiguous.
        dtype: Of the result.

    Returns:
        (C).
    """
    parts, width = partial_PC.shape
    total = partial_PC.new_empty(width, dtype=dtype)
    fused.launch(_join_kernel, (triton.cdiv(width, _BLOCK_WIDTH),), partial_PC, total, parts, **layout(width))
    return total


def layout(width: int) -> dict[str, int]:
    """What the kernel is compiled for."""
    return {"WIDTH": width, "BLOCK_PARTS": _BLOCK_PARTS, "BLOCK_WIDTH": _BLOCK_WIDTH}


@triton.jit
def _join_kernel(
    partial,
    total,
    num_parts,
    WIDTH: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = columns < WIDTH
    sums = tl.zeros((BLOCK_PARTS, BLOCK_WIDTH), dtype=tl.float32)
    for first in range(0, num_parts, BLOCK_PARTS):
        parts = first + tl.arange(0, BLOCK_PARTS)
        place = parts.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        sums += tl.load(partial + place, mask=(parts < num_parts)[:, None] & inside[None, :], other=0.0)
    tl.store(total + columns, tl.sum(sums, axis=0).to(total.dtype.element_ty), mask=inside)
