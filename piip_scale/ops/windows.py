"""Cutting a token grid into square windows and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def split_windows(grid_BHWC: Tensor, size: int) -> Tensor:
    """Square windows of a grid, zero-padded at the bottom and right to a whole number of them.

    Args:
        grid_BHWC: Tokens (B, H, W, C).
        size: Side of a window in tokens.

    Returns:
        (B * windows, size * size, C), windows and tokens rows first.
    """
    height, width = grid_BHWC.shape[1:3]
    padded = functional.pad(grid_BHWC, (0, 0, 0, -width % size, 0, -height % size))
    tiles = padded.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    windows_NLC: Tensor = tiles.transpose(2, 3).flatten(3, 4).flatten(0, 2)
    return windows_NLC


def join_windows(windows_NLC: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of ``split_windows``, without its padding.

    Args:
        windows_NLC: (B * windows, size * size, C).
        size: Side of a window in tokens.
        height: Rows of the grid.
        width: Columns of the grid.

    Returns:
        (B, height, width, C).
    """
    rows, columns = -(-height // size), -(-width // size)
    tiles = windows_NLC.unflatten(0, (-1, rows, columns)).unflatten(3, (size, size))
    grid_BHWC: Tensor = tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return grid_BHWC[:, :height, :width]


def gather_windows(windows_NLC: Tensor, size: int, height: int, width: int) -> Tensor:
    """All cells of an image without padding, in the order that costs least: for attention, which minds none.

    Args:
        windows_NLC: As ``join_windows``.
        size: Likewise.
        height: Likewise.
        width: Likewise.

    Returns:
        (B, height * width, C); window by window, with no copy, where windows divide the grid.
    """
    # Compiled code takes one way for all sizes: it would be another program for those that windows divide.
    if torch.compiler.is_compiling() or height % size or width % size:
        return join_windows(windows_NLC, size, height, width).flatten(1, 2)
    return windows_NLC.reshape(-1, height * width, windows_NLC.shape[-1])
