"""Deformable attention as Triton kernels: each query's samples are weighted as they are read, never stored.

Values may be half precision; everything is accumulated in float32. The twin of ``ops.deform_attention``'s reference.
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

_TILE_ELEMENTS = 2048
"""Queries times channels that one program holds in registers, four corners at a time."""


def deform_attention_triton(value_BHWMD: Tensor, locations_BLMP2: Tensor, weights_BLMP: Tensor) -> Tensor:
    """``ops.deform_attention.deform_attention`` on a CUDA device, or anywhere under ``TRITON_INTERPRET=1``.

    Args:
        value_BHWMD: Values on their grid (B, H, W, heads, D), float32, float16 or bfloat16.
        locations_BLMP2: Where queries look, x then y, float32 (B, L, heads, points, 2).
        weights_BLMP: Weight of each sample, float32 (B, L, heads, points).

    Returns:
        (B, L, heads, D) in the values' dtype.
    """
    output: Tensor = _DeformAttention.apply(value_BHWMD, locations_BLMP2, weights_BLMP)
    return output


class _DeformAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_BHWMD: Tensor, locations_BLMP2: Tensor, weights_BLMP: Tensor) -> Tensor:
        value, locations, weights = (t.contiguous() for t in (value_BHWMD, locations_BLMP2, weights_BLMP))
        ctx.save_for_backward(value, locations, weights)
        batch, queries, heads, _ = weights.shape
        output = value.new_empty(batch, queries, heads, value.shape[-1])
        if not value.is_meta:
            grid, sizes = _launch(value, weights)
            _forward_kernel[grid](value, locations, weights, output, **sizes)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output_BLMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, locations, weights = ctx.saved_tensors
        # Several queries add to one cell: in half precision most of what they add would be rounded away.
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
        grads = (grad_output_BLMD.contiguous(), grad_value, grad_locations, grad_weights)
        if not value.is_meta:
            grid, sizes = _launch(value, weights)
            _backward_kernel[grid](value, locations, weights, *grads, **sizes)
        return grad_value.to(value.dtype), grad_locations, grad_weights


def _launch(value: Tensor, weights: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs to start, each for some queries of one head of one image, and what they need to know."""
    batch, height, width, heads, channels = value.shape
    queries, points = weights.shape[1], weights.shape[3]
    block_channels = triton.next_power_of_2(channels)
    block_queries = max(1, min(triton.next_power_of_2(queries), _TILE_ELEMENTS // block_channels))
    sizes = {
        "num_queries": queries,
        "height": height,
        "width": width,
        "num_heads": heads,
        "num_channels": channels,
        "NUM_POINTS": points,
        "BLOCK_QUERIES": block_queries,
        "BLOCK_CHANNELS": block_channels,
    }
    return (triton.cdiv(queries, block_queries), batch * heads), sizes


@triton.jit
def _load_corner(cells, row, column, height, width, stride, channels, keep):
    """One corner's cell for every query, zero outside the map; float32 (queries, channels)."""
    # Compared as floats: a location far outside must not wrap around as an integer.
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    offset = (row * width + column).to(tl.int64) * stride
    mask = inside[:, None] & keep
    return tl.load(cells + offset[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _add_corner(cells, row, column, height, width, stride, channels, keep, amount):
    """Adds to one corner's cell for every query."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    offset = (row * width + column).to(tl.int64) * stride
    mask = inside[:, None] & keep
    tl.atomic_add(cells + offset[:, None] + channels[None, :], amount, mask=mask)


@triton.jit
def _forward_kernel(
    value,
    locations,
    weights,
    output,
    num_queries,
    height,
    width,
    num_heads,
    num_channels,
    NUM_POINTS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = tl.program_id(1) % num_heads
    queries = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    channels = tl.arange(0, BLOCK_CHANNELS)
    known = queries < num_queries
    keep = known[:, None] & (channels < num_channels)[None, :]
    stride = num_heads * num_channels
    cells = value + batch * height * width * stride + head * num_channels
    items = (batch * num_queries + queries) * num_heads + head
    total = tl.zeros((BLOCK_QUERIES, BLOCK_CHANNELS), dtype=tl.float32)
    for point in range(NUM_POINTS):
        sample = items * NUM_POINTS + point
        x = tl.load(locations + 2 * sample, mask=known, other=0.0) * width - 0.5
        y = tl.load(locations + 2 * sample + 1, mask=known, other=0.0) * height - 0.5
        weight = tl.load(weights + sample, mask=known, other=0.0)
        left, top = tl.floor(x), tl.floor(y)
        right_share, low_share = x - left, y - top
        high = weight * (1 - low_share)
        low = weight * low_share
        top_left = _load_corner(cells, top, left, height, width, stride, channels, keep)
        top_right = _load_corner(cells, top, left + 1, height, width, stride, channels, keep)
        low_left = _load_corner(cells, top + 1, left, height, width, stride, channels, keep)
        low_right = _load_corner(cells, top + 1, left + 1, height, width, stride, channels, keep)
        total += (high * (1 - right_share))[:, None] * top_left + (high * right_share)[:, None] * top_right
        total += (low * (1 - right_share))[:, None] * low_left + (low * right_share)[:, None] * low_right
    place = output + items[:, None] * num_channels + channels[None, :]
    tl.store(place, total.to(output.dtype.element_ty), mask=keep)


@triton.jit
def _backward_kernel(
    value,
    locations,
    weights,
    grad_output,
    grad_value,
    grad_locations,
    grad_weights,
    num_queries,
    height,
    width,
    num_heads,
    num_channels,
    NUM_POINTS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = tl.program_id(1) % num_heads
    queries = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    channels = tl.arange(0, BLOCK_CHANNELS)
    known = queries < num_queries
    keep = known[:, None] & (channels < num_channels)[None, :]
    stride = num_heads * num_channels
    first = batch * height * width * stride + head * num_channels
    cells, grad_cells = value + first, grad_value + first
    items = (batch * num_queries + queries) * num_heads + head
    place = items[:, None] * num_channels + channels[None, :]
    grad = tl.load(grad_output + place, mask=keep, other=0.0).to(tl.float32)
    for point in range(NUM_POINTS):
        sample = items * NUM_POINTS + point
        x = tl.load(locations + 2 * sample, mask=known, other=0.0) * width - 0.5
        y = tl.load(locations + 2 * sample + 1, mask=known, other=0.0) * height - 0.5
        weight = tl.load(weights + sample, mask=known, other=0.0)
        left, top = tl.floor(x), tl.floor(y)
        right_share, low_share = (x - left)[:, None], (y - top)[:, None]
        top_left = _load_corner(cells, top, left, height, width, stride, channels, keep)
        top_right = _load_corner(cells, top, left + 1, height, width, stride, channels, keep)
        low_left = _load_corner(cells, top + 1, left, height, width, stride, channels, keep)
        low_right = _load_corner(cells, top + 1, left + 1, height, width, stride, channels, keep)
        high = top_left + right_share * (top_right - top_left)
        low = low_left + right_share * (low_right - low_left)
        across = (1 - low_share) * (top_right - top_left) + low_share * (low_right - low_left)
        tl.store(grad_weights + sample, tl.sum(grad * (high + low_share * (low - high)), axis=1), mask=known)
        tl.store(grad_locations + 2 * sample, weight * width * tl.sum(grad * across, axis=1), mask=known)
        tl.store(grad_locations + 2 * sample + 1, weight * height * tl.sum(grad * (low - high), axis=1), mask=known)
        upper = weight[:, None] * (1 - low_share) * grad
        lower = weight[:, None] * low_share * grad
        _add_corner(grad_cells, top, left, height, width, stride, channels, keep, upper * (1 - right_share))
        _add_corner(grad_cells, top, left + 1, height, width, stride, channels, keep, upper * right_share)
        _add_corner(grad_cells, top + 1, left, height, width, stride, channels, keep, lower * (1 - right_share))
        _add_corner(grad_cells, top + 1, left + 1, height, width, stride, channels, keep, lower * right_share)
