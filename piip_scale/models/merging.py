"""Joining the branches' features into one map on the highest-resolution branch's grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from piip_scale.config.model import GROUPS
from piip_scale.models.layers import Conv2d
from piip_scale.ops.resize import resize_map


class Merging(nn.Module):
    """The weighted sum of all branches' features, brought to one width and one grid.

    Args:
        dims: The branches' widths, largest model first.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(MergePart(dim, dims[0]) for dim in dims)

    def forward(self, *grids_BHWC: Tensor) -> Tensor:
        """One grid (B, H_i, W_i, C_i) a branch to float32 (B, C_1, H_N, W_N)."""
        height, width = grids_BHWC[-1].shape[1:3]
        maps = [part(grid, height, width) for part, grid in zip(self.parts, grids_BHWC, strict=True)]
        return torch.stack(maps).sum(0)


class MergePart(nn.Module):
    """One branch's share of the sum: convolved, resized and weighted."""

    def __init__(self, dim: int, merged_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_conv_norm_relu(dim, merged_dim), *_conv_norm_relu(merged_dim, merged_dim))
        self.weight = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight in the sum to 1."""
        nn.init.ones_(self.weight)

    def forward(self, grid_BHWC: Tensor, height: int, width: int) -> Tensor:
        """(B, H, W, C) to float32 (B, C_1, height, width)."""
        map_BCHW = resize_map(self.layers(grid_BHWC.permute(0, 3, 1, 2)), height, width)
        return map_BCHW * self.weight


class NoMerging(nn.Module):
    """A single branch's grid as a map."""

    def forward(self, grid_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) to (B, C, H, W)."""
        return grid_BHWC.permute(0, 3, 1, 2)


def _conv_norm_relu(dim: int, merged_dim: int) -> tuple[nn.Module, ...]:
    conv = Conv2d(dim, merged_dim, kernel_size=3, padding=1, bias=False)
    return conv, nn.GroupNorm(GROUPS, merged_dim), nn.ReLU()
