"""Rotary positions of cells on a grid: the angles, and turning queries and keys by them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def centred_places(cells: Tensor, side: int) -> Tensor:
    """Angles of cells' centres, where an image's edges are at -1 and 1 and a unit is a turn.

    Args:
        cells: Indices from 0 on, any shape; those from ``side`` on lie beyond the edge.
        side: Cells of the image's side.
    """
    return 2 * math.pi * (2 * ((cells + 0.5) / side) - 1)


def counted_places(cells: Tensor, side: int, pretrain_side: int, offset: float) -> Tensor:
    """Angles of cells that are counted, one radian each.

    Args:
        cells: As ``centred_places``.
        side: Likewise.
        pretrain_side: So many radians from edge to edge, whatever the side; 0 for one each.
        offset: Of the first cell, before the count is scaled.
    """
    places = cells + offset
    return places / side * pretrain_side if pretrain_side else places


def rotary_table(first_N: Tensor, second_N: Tensor, size: int, base: float) -> Tensor:
    """Cosines and sines for each token and pair of a head's channels.

    Args:
        first_N: Angle of each token on the axis that turns the first pairs of channels, for the fastest pair.
        second_N: On the other axis.
        size: Channels of a head, a multiple of 4.
        base: What the period grows by from an axis's first pair to the one after its last.

    Returns:
        (2, N, size / 2) in the angles' dtype: cosines, then sines.

    Source: Su et al., RoFormer, on two axes.
    """
    steps = torch.arange(size // 4, device=first_N.device, dtype=first_N.dtype) / (size // 4)
    angles_NP = torch.cat([places[:, None] / base**steps for places in (first_N, second_N)], -1)
    return torch.stack((angles_NP.cos(), angles_NP.sin()))


def rotate(heads_BHLD: Tensor, table_2WLP: Tensor, halves: bool) -> Tensor:
    """Turns each pair of channels of each token, in at least float32.

    Args:
        heads_BHLD: Queries or keys (B, heads, L, D); of windows, all those of an image follow each other.
        table_2WLP: Of each of an image's windows and each of D / 2 pairs, from ``rotary_table``; one for all windows
            (2, 1, L, D / 2) too.
        halves: Whether a pair is the same place of both halves of a head; else two neighbours.

    Returns:
        (B, heads, L, D) in the dtype of ``heads_BHLD``, in memory as that lies.
    """
    windows, table = heads_BHLD.unflatten(0, (-1, table_2WLP.shape[1])), table_2WLP.unsqueeze(2)
    # A compiler makes one kernel of the formula by itself.
    turned = rotate_plain if torch.compiler.is_compiling() else _rotate_at_once
    return turned(windows, table, halves).flatten(0, 1)


def rotate_plain(heads: Tensor, table: Tensor, halves: bool) -> Tensor:
    """``rotate`` by the formula, for a table (2, ...) that broadcasts to the pairs of ``heads`` (..., D)."""
    first, second = _pairs(heads.to(torch.promote_types(heads.dtype, torch.float32)), halves)
    cosines, sines = table
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    whole = torch.cat(turned, -1) if halves else torch.stack(turned, -1).flatten(-2)
    return whole.to(heads.dtype)


def _rotate_at_once(heads: Tensor, table: Tensor, halves: bool) -> Tensor:
    turned: Tensor = _Rotation.apply(heads, table, halves)
    return turned


class _Rotation(torch.autograd.Function):
    """Turns in few passes over memory, and gradients back; each step of the formula would make a copy."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, table: Tensor, halves: bool) -> Tensor:
        ctx.save_for_backward(table)
        ctx.turn = _turn_halves if halves else _turn_neighbours
        turned: Tensor = ctx.turn(heads, *table, 1)
        return turned

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        return ctx.turn(gradient, *table, -1), None, None


def _turn_neighbours(heads: Tensor, cosines: Tensor, sines: Tensor, sign: int) -> Tensor:
    """Neighbours in memory are a complex number: turning is one product."""
    pairs = heads.to(cosines.dtype).unflatten(-1, (-1, 2))
    strides = (*pairs.stride()[:-1], pairs.storage_offset())
    if pairs.stride(-1) != 1 or any(stride % 2 for stride in strides):
        pairs = pairs.contiguous()
    turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cosines, sign * sines))
    return turned.flatten(-2).to(heads.dtype)


def _turn_halves(heads: Tensor, cosines: Tensor, sines: Tensor, sign: int) -> Tensor:
    turned = torch.empty_like(heads)
    (first, second), (first_place, second_place) = heads.chunk(2, -1), turned.chunk(2, -1)
    _write(first_place, first, second, cosines, sines, -sign)
    _write(second_place, second, first, cosines, sines, sign)
    return turned


def _write(place: Tensor, own: Tensor, other: Tensor, cosines: Tensor, sines: Tensor, side: int) -> None:
    """``own * cosines + side * other * sines`` into its place, rounded there once."""
    if place.dtype == cosines.dtype:
        torch.mul(own, cosines, out=place)
        place.addcmul_(other, sines, value=side)
    else:
        torch.addcmul(own * cosines, other, sines, value=side, out=place)


def _pairs(heads: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    """First and second channels of all pairs (..., D / 2)."""
    first, second = heads.chunk(2, -1) if halves else (heads[..., ::2], heads[..., 1::2])
    return first, second
