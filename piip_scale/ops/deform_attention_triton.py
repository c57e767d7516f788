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

from piip_scale.ops import fused

_TILE_ELEMENTS = 1024
"""Queries times channels that one program holds.

Of 512, 1024, 2048 and 4096 none spills (sm_90, Triton 3.9): the backward kernel takes 40, 94, 152 and 242 registers for
heads of 100 channels. 1024 is the most that lets four programs share a multiprocessor; no GPU has been asked yet.
"""


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
        grid, sizes = _programs(value, weights)
        fused.launch(_forward_kernel, grid, value, locations, weights, output, **sizes)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output_BLMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, locations, weights = ctx.saved_tensors
        # Several queries add to one cell: in half precision most of what they add would be rounded away.
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
        grads = (grad_output_BLMD.contiguous(), grad_value, grad_locations, grad_weights)
        grid, sizes = _programs(value, weights)
        fused.launch(_backward_kernel, grid, value, locations, weights, *grads, **sizes)
        return grad_value.to(value.dtype), grad_locations, grad_weights


def _programs(value: Tensor, weights: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs to start, each for some queries of one head of one image, and what they need to know."""
    batch, height, width, heads, channels = value.shape
    queries, points = weights.shape[1], weights.shape[3]
    grid = (triton.cdiv(queries, block_queries(channels)), batch * heads)
    return grid, {"num_queries": queries, "height": height, "width": width} | layout(heads, channels, points)


def layout(heads: int, channels: int, points: int) -> dict[str, int]:
    """The sizes that kernels are compiled for: a network has few of them, while images have many sizes.

    Known strides let the compiler see that rows of 40 or 100 channels are aligned: loads of 16 and 8 bytes in half
    precision and atomics of 4 floats, where sizes at run time give loads of 2 bytes and atomics of 1 float.
    """
    return {
        "NUM_HEADS": heads,
        "NUM_CHANNELS": channels,
        "NUM_POINTS": points,
        "BLOCK_QUERIES": block_queries(channels),
        "BLOCK_CHANNELS": triton.next_power_of_2(channels),
    }


def block_queries(channels: int) -> int:
    """Queries of one program for heads of this width."""
    padded: int = triton.next_power_of_2(channels)
    return max(1, _TILE_ELEMENTS // padded)


@triton.jit
def _corner(row, column, height, width, STRIDE: tl.constexpr, channels, keep):
    """Offsets (queries, channels) of one corner's cells from the first cell, and which of them lie on the map."""
    # Compared as floats, and outside the map replaced: a location far away must not wrap around as an integer.
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    cell = tl.where(inside, row * width + column, 0.0).to(tl.int64)
    return (cell * STRIDE)[:, None] + channels[None, :], inside[:, None] & keep


@triton.jit
def _forward_kernel(
    value,
    locations,
    weights,
    output,
    num_queries,
    height,
    width,
    NUM_HEADS: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    NUM_POINTS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    batch = (tl.program_id(1) // NUM_HEADS).to(tl.int64)
    head = tl.program_id(1) % NUM_HEADS
    queries = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    channels = tl.arange(0, BLOCK_CHANNELS)
    known = queries < num_queries
    keep = known[:, None] & (channels < NUM_CHANNELS)[None, :]
    STRIDE: tl.constexpr = NUM_HEADS * NUM_CHANNELS
    cells = value + batch * height * width * STRIDE + head * NUM_CHANNELS
    items = (batch * num_queries + queries) * NUM_HEADS + head
    total = tl.zeros((BLOCK_QUERIES, BLOCK_CHANNELS), dtype=tl.float32)
    # Not unrolled: four points' loads at once would take most registers of a multiprocessor from other programs.
    for point in range(NUM_POINTS):
        sample = items * NUM_POINTS + point
        x = tl.load(locations + 2 * sample, mask=known, other=0.0) * width - 0.5
        y = tl.load(locations + 2 * sample + 1, mask=known, other=0.0) * height - 0.5
        weight = tl.load(weights + sample, mask=known, other=0.0)
        left, top = tl.floor(x), tl.floor(y)
        right_share, low_share = x - left, y - top
        for corner in tl.static_range(4):
            share_y = low_share if corner // 2 else 1 - low_share
            share_x = right_share if corner % 2 else 1 - right_share
            at, mask = _corner(top + corner // 2, left + corner % 2, height, width, STRIDE, channels, keep)
            found = tl.load(cells + at, mask=mask, other=0.0).to(tl.float32)
            total += (weight * share_y * share_x)[:, None] * found
    result = output + items[:, None] * NUM_CHANNELS + channels[None, :]
    tl.store(result, total.to(output.dtype.element_ty), mask=keep)


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
    NUM_HEADS: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    NUM_POINTS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    batch = (tl.program_id(1) // NUM_HEADS).to(tl.int64)
    head = tl.program_id(1) % NUM_HEADS
    queries = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    channels = tl.arange(0, BLOCK_CHANNELS)
    known = queries < num_queries
    keep = known[:, None] & (channels < NUM_CHANNELS)[None, :]
    STRIDE: tl.constexpr = NUM_HEADS * NUM_CHANNELS
    first = batch * height * width * STRIDE + head * NUM_CHANNELS
    cells, grad_cells = value + first, grad_value + first
    items = (batch * num_queries + queries) * NUM_HEADS + head
    own = items[:, None] * NUM_CHANNELS + channels[None, :]
    grad = tl.load(grad_output + own, mask=keep, other=0.0).to(tl.float32)
    for point in range(NUM_POINTS):
        sample = items * NUM_POINTS + point
        x = tl.load(locations + 2 * sample, mask=known, other=0.0) * width - 0.5
        y = tl.load(locations + 2 * sample + 1, mask=known, other=0.0) * height - 0.5
        weight = tl.load(weights + sample, mask=known, other=0.0)
        left, top = tl.floor(x), tl.floor(y)
        right_share, low_share = x - left, y - top
        grad_weight = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
        grad_x = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
        grad_y = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
        # A corner at a time: the products of all four at once do not fit the registers.
        for corner in tl.static_range(4):
            share_y = low_share if corner // 2 else 1 - low_share
            share_x = right_share if corner % 2 else 1 - right_share
            at, mask = _corner(top + corner // 2, left + corner % 2, height, width, STRIDE, channels, keep)
            found = tl.load(cells + at, mask=mask, other=0.0).to(tl.float32)
            product = tl.sum(grad * found, axis=1)
            grad_weight += share_y * share_x * product
            grad_x += share_y * product if corner % 2 else -share_y * product
            grad_y += share_x * product if corner // 2 else -share_x * product
            # Nothing is read after what is added: Triton's default order, acq_rel, would put a fence around each.
            tl.atomic_add(grad_cells + at, (weight * share_y * share_x)[:, None] * grad, mask=mask, sem="relaxed")
        tl.store(grad_weights + sample, grad_weight, mask=known)
        tl.store(grad_locations + 2 * sample, weight * width * grad_x, mask=known)
        tl.store(grad_locations + 2 * sample + 1, weight * height * grad_y, mask=known)
