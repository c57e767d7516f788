"""Rotary positions of cells on a grid: the angles, and turning queries and keys by them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def rotary_table(first_N: Tensor, second_N: Tensor, size: int, base: float, halves: bool) -> Tensor:
    """Cosines and sines for each token and channel of a head.

    Args:
        first_N: Angle of each token on the axis that turns the first pairs of channels, for the fastest pair.
        second_N: On the other axis.
        size: Channels of a head, a multiple of 4.
        base: What the period grows by from an axis's first pair to the one after its last.
        halves: Whether a pair is the same place of both halves of a head; else two neighbours.

    Returns:
        (2, N, size) in the angles' dtype: cosines, then sines.

    Source: Su et al., RoFormer, on two axes.
    """
    steps = torch.arange(size // 4, device=first_N.device, dtype=first_N.dtype) / (size // 4)
    angles_NP = torch.cat([places[:, None] / base**steps for places in (first_N, second_N)], -1)
    parts_2NP = torch.stack((angles_NP.cos(), angles_NP.sin()))
    return parts_2NP.repeat(1, 1, 2) if halves else parts_2NP.repeat_interleave(2, -1)


def rotate(heads_BHLD: Tensor, table_2WLD: Tensor, halves: bool) -> Tensor:
    """Turns each pair of channels of each token, in at least float32.

    Args:
        heads_BHLD: Queries or keys (B, heads, L, D); of windows, all those of an image follow each other.
        table_2WLD: Of each of an image's windows, from ``rotary_table``; one for all (2, 1, L, D) too.
        halves: As there.

    Returns:
        (B, heads, L, D) in the dtype of ``heads_BHLD``.
    """
    cos_W1LD, sin_W1LD = table_2WLD.unsqueeze(2)
    wide = torch.promote_types(heads_BHLD.dtype, torch.float32)
    windows = heads_BHLD.unflatten(0, (-1, table_2WLD.shape[1])).to(wide)
    turned: Tensor = windows * cos_W1LD + _quarter_turn(windows, halves) * sin_W1LD
    return turned.flatten(0, 1).to(heads_BHLD.dtype)


def _quarter_turn(heads: Tensor, halves: bool) -> Tensor:
    if halves:
        first, second = heads.chunk(2, -1)
        return torch.cat((-second, first), -1)
    first, second = heads.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), -1).flatten(-2)
