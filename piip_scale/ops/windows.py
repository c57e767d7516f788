"""Cutting a token grid into square windows and back."""

from __future__ import annotations

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
