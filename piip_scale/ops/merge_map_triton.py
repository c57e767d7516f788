"""``ops.merge_map.add_resized`` as Triton kernels over maps whose channels lie together.

The backward pass gathers for each cell of the map what cells of the sum took from it, instead of adding with atomics
as torch's does: the same bits from run to run.
"""

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

_BLOCK_COLUMNS, _BLOCK_WIDTH = 8, 256
"""A tile of 16 elements a thread: loads of 16 bytes in half precision."""


def add_resized_triton(
    total_BHWC: Tensor | None, map_BHWC: Tensor, weight_1: Tensor, height: int, width: int
) -> Tensor:
    """``ops.merge_map.add_resized`` with channels last, on a CUDA device, or anywhere under ``TRITON_INTERPRET=1``."""
    output: Tensor = _AddResized.apply(total_BHWC, map_BHWC, weight_1, height, width)
    return output


class _AddResized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor | None, source: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
        source = source.contiguous()
        total = None if total is None else total.float().contiguous()
        batch, rows, columns, channels = source.shape
        output = source.new_empty(batch, height, width, channels, dtype=torch.float32)
        grid = (triton.cdiv(width, _BLOCK_COLUMNS), triton.cdiv(channels, _BLOCK_WIDTH), batch * height)
        sizes, constants = (rows, columns, height, width), layout(channels)
        constants |= {"BEGINS": int(total is None)}
        fused.launch(_forward_kernel, grid, source, total, weight, output, *sizes, **constants)
        ctx.save_for_backward(source, weight)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source, weight = ctx.saved_tensors
        grad = grad.contiguous()
        batch, rows, columns, channels = source.shape
        height, width = grad.shape[1:3]
        grid = (triton.cdiv(columns, _BLOCK_COLUMNS), triton.cdiv(channels, _BLOCK_WIDTH), batch * rows)
        grad_source, partial = torch.empty_like(source), grad.new_empty(grid)
        # A cell is looked at from less than two cells of its own grid away.
        sizes = (rows, columns, height, width, 2 * width // columns + 3)
        fused.launch(_backward_kernel, grid, grad, source, weight, grad_source, partial, *sizes, **layout(channels))
        return (
            grad if ctx.needs_input_grad[0] else None,
            grad_source,
            partial.sum().to(weight.dtype).view(1),
            None,
            None,
        )


def layout(channels: int) -> dict[str, int]:
    """What kernels are compiled for: a width known at compile time lets rows be read in wide loads."""
    return {"WIDTH": channels, "BLOCK_COLUMNS": _BLOCK_COLUMNS, "BLOCK_WIDTH": _BLOCK_WIDTH}


@triton.jit
def _looked_at(index, size, target_size):
    """Where a cell of the target grid looks on the source's, in its cells, by torch's rule for aligned edges."""
    place = (index + 0.5) * (size / target_size) - 0.5
    return tl.minimum(tl.maximum(place, 0.0), size - 1.0)


@triton.jit
def _forward_kernel(
    source,
    total,
    weight,
    output,
    rows,
    columns,
    height,
    width,
    WIDTH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BEGINS: tl.constexpr,
):
    sample, row = (tl.program_id(2) // height).to(tl.int64), tl.program_id(2) % height
    cells = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    channels = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    keep = (cells < width)[:, None] & (channels < WIDTH)[None, :]
    y, x = _looked_at(row, rows, height), _looked_at(cells, columns, width)
    top, left = tl.floor(y), tl.floor(x)
    found = tl.zeros((BLOCK_COLUMNS, BLOCK_WIDTH), dtype=tl.float32)
    for corner in tl.static_range(4):
        share_y = y - top if corner // 2 else 1 - (y - top)
        share = share_y * (x - left if corner % 2 else 1 - (x - left))
        at = (sample * rows + (top + corner // 2).to(tl.int32)) * columns + (left + corner % 2).to(tl.int32)
        # A corner beyond the last row or column has no share, and is not read.
        mask = keep & (share > 0)[:, None]
        part = tl.load(source + at[:, None] * WIDTH + channels[None, :], mask=mask, other=0.0)
        found += share[:, None] * part.to(tl.float32)
    own = ((sample * height + row) * width + cells)[:, None] * WIDTH + channels[None, :]
    result = tl.load(weight).to(tl.float32) * found
    if not BEGINS:
        result += tl.load(total + own, mask=keep, other=0.0)
    tl.store(output + own, result, mask=keep)


@triton.jit
def _backward_kernel(
    grad,
    source,
    weight,
    grad_source,
    partial,
    rows,
    columns,
    height,
    width,
    reach,
    WIDTH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    sample, row = (tl.program_id(2) // rows).to(tl.int64), tl.program_id(2) % rows
    cells = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    channels = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    keep = (cells < columns)[:, None] & (channels < WIDTH)[None, :]
    scale = height / rows
    first = tl.maximum(tl.floor((row - 0.5) * scale - 0.5), 0.0).to(tl.int32)
    last = tl.minimum(tl.ceil((row + 1.5) * scale - 0.5), height - 1.0).to(tl.int32)
    left = tl.maximum(tl.floor((cells - 0.5) * (width / columns) - 0.5), 0.0).to(tl.int32)
    gathered = tl.zeros((BLOCK_COLUMNS, BLOCK_WIDTH), dtype=tl.float32)
    for y in range(first, last + 1):
        share_y = 1 - tl.abs(_looked_at(y, rows, height) - row)
        for step in range(reach):
            x = left + step
            share = tl.maximum(share_y, 0.0) * tl.maximum(1 - tl.abs(_looked_at(x, columns, width) - cells), 0.0)
            mask = keep & ((x < width) & (share > 0))[:, None]
            at = ((sample * height + y) * width + x)[:, None] * WIDTH + channels[None, :]
            gathered += share[:, None] * tl.load(grad + at, mask=mask, other=0.0)
    own = ((sample * rows + row) * columns + cells)[:, None] * WIDTH + channels[None, :]
    scaled = tl.load(weight).to(tl.float32) * gathered
    tl.store(grad_source + own, scaled.to(grad_source.dtype.element_ty), mask=keep)
    product = gathered * tl.load(source + own, mask=keep, other=0.0).to(tl.float32)
    place = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(partial + place, tl.sum(product))
