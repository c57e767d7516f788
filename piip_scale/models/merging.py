"""Joining the branches' features into one map on the highest-resolution branch's grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from piip_scale.geometry import GROUPS
from piip_scale.models.layers import Conv2d, Linear
from piip_scale.ops.resize import resize_map


class Merging(nn.Module):
    """The weighted sum of all branches' features, brought to one width and one grid.

    Args:
        dims: The branches' widths, largest model first.
        kind: How a branch is brought to the first one's width: ``simple``, ``regular`` (the pyramids' kinds) or
            ``pooled`` (the classification head's).
    """

    def __init__(self, dims: Sequence[int], kind: str) -> None:
        super().__init__()
        build = _PARTS[kind]
        self.parts = nn.ModuleList(MergePart(build(dim, dims[0], index)) for index, dim in enumerate(dims))

    def forward(self, *grids_BHWC: Tensor) -> Tensor:
        """One grid (B, H_i, W_i, C_i) a branch to float32 (B, C_1, H_N, W_N)."""
        height, width = grids_BHWC[-1].shape[1:3]
        maps = [part(grid, height, width) for part, grid in zip(self.parts, grids_BHWC, strict=True)]
        return torch.stack(maps).sum(0)


class MergePart(nn.Module):
    """One branch's share of the sum: brought to the common width, resized and weighted."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        # The released weight has no axis; DeepSpeed 0.19.8 cannot broadcast such a parameter.
        self.weight = nn.Parameter(torch.empty(1))
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


class ChannelLinear(Linear):
    """A linear layer over the channels of a map."""

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        return super().forward(map_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _norm(dim: int) -> nn.Module:
    return nn.GroupNorm(GROUPS, dim)


def _conv(dim: int, merged_dim: int) -> nn.Module:
    return Conv2d(dim, merged_dim, kernel_size=3, padding=1, bias=False)


def _simple_part(dim: int, merged_dim: int, index: int) -> nn.Module:
    first = (_conv(dim, merged_dim), _norm(merged_dim), nn.ReLU())
    return nn.Sequential(*first, _conv(merged_dim, merged_dim), _norm(merged_dim), nn.ReLU())


def _regular_part(dim: int, merged_dim: int, index: int) -> nn.Module:
    conv = [_conv(dim, merged_dim)] if index else []
    return nn.Sequential(*conv, _norm(merged_dim), nn.ReLU())


def _pooled_part(dim: int, merged_dim: int, index: int) -> nn.Module:
    widen = [ChannelLinear(dim, merged_dim), _norm(merged_dim)] if index else []
    return nn.Sequential(_norm(dim), *widen)


_PARTS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "simple": _simple_part,
    "regular": _regular_part,
    "pooled": _pooled_part,
}
