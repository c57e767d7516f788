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
    output: Tensor = _DeformAttention.apply(value_BHWMD, locations_BLMP2, weights_BLMP, (0, 0))
    return output


def grid_deform_attention_triton(value_BHWMD: Tensor, offsets_BhwMP2: Tensor, scores_BhwMP: Tensor) -> Tensor:
    """``ops.deform_attention.grid_deform_attention`` on a CUDA device, or anywhere under ``TRITON_INTERPRET=1``.

    Args:
        value_BHWMD: Values on their grid (B, H, W, heads, D), float32, float16 or bfloat16.
        offsets_BhwMP2: Offsets (B, h, w, heads, points, 2) of any such dtype.
        scores_BhwMP: Scores (B, h, w, heads, points) of the offsets' dtype.

    Returns:
        (B, h, w, heads, D) in the values' dtype.
    """
    grid = scores_BhwMP.shape[1:3]
    places_BLMP2, scores_BLMP = offsets_BhwMP2.flatten(1, 2), scores_BhwMP.flatten(1, 2)
    found_BLMD = _DeformAttention.apply(value_BHWMD, places_BLMP2, scores_BLMP, tuple(grid))
    output: Tensor = found_BLMD.unflatten(1, grid)
    return output


class _DeformAttention(torch.autograd.Function):
    """Of queries anywhere, or on a grid of their own, where places are offsets and weights are scores."""

    @staticmethod
    def forward(
        ctx: Any, value_BHWMD: Tensor, places_BLMP2: Tensor, weights_BLMP: Tensor, query_grid: tuple[int, int]
    ) -> Tensor:
        value, places, weights = (t.contiguous() for t in (value_BHWMD, places_BLMP2, weights_BLMP))
        ctx.save_for_backward(value, places, weights)
        ctx.query_grid = query_grid
        batch, queries, heads, _ = weights.shape
        output = value.new_empty(batch, queries, heads, value.shape[-1])
        grid, sizes = _programs(value, weights, query_grid)
        fused.launch(_forward_kernel, grid, value, places, weights, output, **sizes)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output_BLMD: Tensor) -> tuple[Tensor | None, ...]:
        value, places, weights = ctx.saved_tensors
        # Several queries add to one cell: in half precision most of what they add would be rounded away.
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        grad_places, grad_weights = torch.empty_like(places), torch.empty_like(weights)
        grads = (grad_output_BLMD.contiguous(), grad_value, grad_places, grad_weights)
        grid, sizes = _programs(value, weights, ctx.query_grid)
        fused.launch(_backward_kernel, grid, value, places, weights, *grads, **sizes)
        return grad_value.to(value.dtype), grad_places, grad_weights, None


def _programs(value: Tensor, weights: Tensor, query_grid: tuple[int, int]) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs to start, each for some queries of one head of one image, and what they need to know."""
    batch, height, width, heads, channels = value.shape
    queries, points = weights.shape[1], weights.shape[3]
    grid = (triton.cdiv(queries, block_queries(channels)), batch * heads)
    sizes = {"num_queries": queries, "height": height, "width": width}
    sizes |= {"query_height": query_grid[0], "query_width": query_grid[1]}
    return grid, sizes | layout(heads, channels, points, on_grid=query_grid != (0, 0))


def layout(heads: int, channels: int, points: int, on_grid: bool = False) -> dict[str, int]:
    """The sizes that kernels are compiled for: a network has few of them, while images have many sizes.

    Known strides let the compiler see that rows of 40 or 100 channels are aligned: loads of 16 and 8 bytes in half
    precision and atomics of 4 floats, where sizes at run time give loads of 2 bytes and atomics of 1 float.
    """
    return {
        "NUM_HEADS": heads,
        "NUM_CHANNELS": channels,
        "NUM_POINTS": points,
        "BLOCK_POINTS": triton.next_power_of_2(points),
        "ON_GRID": int(on_grid),
        "BLOCK_QUERIES": block_queries(channels),
        "BLOCK_CHANNELS": triton.next_power_of_2(channels),
    }


def block_queries(channels: int) -> int:
    """Queries of one program for heads of this width."""
    padded: int = triton.next_power_of_2(channels)
    return max(1, _TILE_ELEMENTS // padded)


@triton.jit
def _point(places, weights, sample, known):
    x = tl.load(places + 2 * sample, mask=known, other=0.0).to(tl.float32)
    y = tl.load(places + 2 * sample + 1, mask=known, other=0.0).to(tl.float32)
    return x, y, tl.load(weights + sample, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _corner(row, column, height, width, STRIDE: tl.constexpr, channels, keep):
    """Offsets (queries, channels) of one corner's cells from the first cell, and which of them lie on the map."""
    # Compared as floats, and outside the map replaced: a location far away must not wrap around as an integer.
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    cell = tl.where(inside, row * width + column, 0.0).to(tl.int64)
    return (cell * STRIDE)[:, None] + channels[None, :], inside[:, None] & keep


@triton.jit
def _centres(queries, query_height, query_width, height, width):
    """Where the centres of queries' own cells lie on the map that is read, in its cells: x, then y."""
    x = (queries % query_width).to(tl.float32) + 0.5
    y = (queries // query_width).to(tl.float32) + 0.5
    return x / query_width * width, y / query_height * height


@triton.jit
def _softmax(scores, items, known, NUM_POINTS: tl.constexpr, BLOCK_POINTS: tl.constexpr):
    """Queries' weights of all points, and what each is made of: the highest score, and the sum of exponentials."""
    points = tl.arange(0, BLOCK_POINTS)
    place = items[:, None] * NUM_POINTS + points[None, :]
    there = (points < NUM_POINTS)[None, :]
    found = tl.load(scores + place, mask=known[:, None] & there, other=0.0).to(tl.float32)
    found = tl.where(there, found, float("-inf"))
    highest = tl.max(found, axis=1)
    found = tl.exp(found - highest[:, None])
    total = tl.sum(found, axis=1)
    return found / total[:, None], highest, total


@triton.jit
def _forward_kernel(
    value,
    places,
    weights,
    output,
    num_queries,
    height,
    width,
    query_height,
    query_width,
    NUM_HEADS: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    NUM_POINTS: tl.constexpr,
    BLOCK_POINTS: tl.constexpr,
    ON_GRID: tl.constexpr,
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
    if ON_GRID:
        centre_x, centre_y = _centres(queries, query_height, query_width, height, width)
        _, highest, exponentials = _softmax(weights, items, known, NUM_POINTS, BLOCK_POINTS)
    # Not unrolled: four points' loads at once would take most registers of a multiprocessor from other programs.
    for point in range(NUM_POINTS):
        sample = items * NUM_POINTS + point
        x, y, weight = _point(places, weights, sample, known)
        if ON_GRID:
            x, y = centre_x + x - 0.5, centre_y + y - 0.5
            weight = tl.exp(weight - highest) / exponentials
        else:
            x, y = x * width - 0.5, y * height - 0.5
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
    places,
    weights,
    grad_output,
    grad_value,
    grad_places,
    grad_weights,
    num_queries,
    height,
    width,
    query_height,
    query_width,
    NUM_HEADS: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    NUM_POINTS: tl.constexpr,
    BLOCK_POINTS: tl.constexpr,
    ON_GRID: tl.constexpr,
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
    points = tl.arange(0, BLOCK_POINTS)
    of_points = tl.zeros((BLOCK_QUERIES, BLOCK_POINTS), dtype=tl.float32)
    if ON_GRID:
        centre_x, centre_y = _centres(queries, query_height, query_width, height, width)
        _, highest, exponentials = _softmax(weights, items, known, NUM_POINTS, BLOCK_POINTS)
    for point in range(NUM_POINTS):
        sample = items * NUM_POINTS + point
        x, y, weight = _point(places, weights, sample, known)
        if ON_GRID:
            x, y = centre_x + x - 0.5, centre_y + y - 0.5
            weight = tl.exp(weight - highest) / exponentials
        else:
            x, y = x * width - 0.5, y * height - 0.5
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
        if ON_GRID:
            of_points = tl.where(points[None, :] == point, grad_weight[:, None], of_points)
        else:
            # A location counts maps, an offset cells.
            grad_x, grad_y = width * grad_x, height * grad_y
            tl.store(grad_weights + sample, grad_weight, mask=known)
        tl.store(grad_places + 2 * sample, (weight * grad_x).to(grad_places.dtype.element_ty), mask=known)
        tl.store(grad_places + 2 * sample + 1, (weight * grad_y).to(grad_places.dtype.element_ty), mask=known)
    if ON_GRID:
        # The softmax's own backward pass; read anew, or shares would take registers all the while.
        shares, _, _ = _softmax(weights, items, known, NUM_POINTS, BLOCK_POINTS)
        grad_scores = shares * (of_points - tl.sum(shares * of_points, axis=1)[:, None])
        there = known[:, None] & (points < NUM_POINTS)[None, :]
        at = items[:, None] * NUM_POINTS + points[None, :]
        tl.store(grad_weights + at, grad_scores.to(grad_weights.dtype.element_ty), mask=there)
