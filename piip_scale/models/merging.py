"""Joining the branches' features into one map on the highest-resolution branch's grid."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from piip_scale.models.layers import Conv2d, GroupNorm, Linear
from piip_scale.ops.merge_map import add_resized


class Merging(nn.Module):
    """The weighted sum of all branches' features, brought to one width and one grid.

    Args:
        dims: The branches' widths, largest model first.
        kind: How a branch is brought to the first one's width: ``simple``, ``regular`` (the pyramids' kinds) or
            ``pooled`` (the classification head's).
        kernel: Name of the fused kernel, see ``ops.fused``.
    """

    def __init__(self, dims: Sequence[int], kind: str, kernel: str = "auto") -> None:
        super().__init__()
        build = _PARTS[kind]
        self.parts = nn.ModuleList(
            MergePart(build(dim, dims[0], index, kernel), kernel) for index, dim in enumerate(dims)
        )

    def forward(self, *grids_BHWC: Tensor) -> Tensor:
        """One grid (B, H_i, W_i, C_i) a branch to float32 (B, C_1, H_N, W_N), channels together in memory."""
        height, width = grids_BHWC[-1].shape[1:3]
        first, *others = zip(self.parts, grids_BHWC, strict=True)
        total_BCHW: Tensor = first[0](None, first[1], height, width)
        for part, grid_BHWC in others:
            total_BCHW = part(total_BCHW, grid_BHWC, height, width)
        return total_BCHW


class MergePart(nn.Module):
    """One branch's share of the sum: brought to the common width, resized, weighted and added to the others'.

    Args:
        layers: Bring maps to the common width.
        kernel: Name of the fused kernel, see ``ops.fused``.
    """

    def __init__(self, layers: nn.Module, kernel: str = "auto") -> None:
        super().__init__()
        self.layers, self.kernel = layers, kernel
        # The released weight has no axis; DeepSpeed 0.19.8 cannot broadcast such a parameter.
        self.weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight in the sum to 1."""
        nn.init.ones_(self.weight)

    def forward(self, total_BCHW: Tensor | None, grid_BHWC: Tensor, height: int, width: int) -> Tensor:
        """The others' sum, if there is one, and (B, H, W, C) to float32 (B, C_1, height, width)."""
        map_BCHW = self.layers(grid_BHWC.permute(0, 3, 1, 2))
        return add_resized(total_BCHW, map_BCHW, self.weight, height, width, self.kernel)


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


def _conv(dim: int, merged_dim: int) -> nn.Module:
    return Conv2d(dim, merged_dim, kernel_size=3, padding=1, bias=False)


def _simple_part(dim: int, merged_dim: int, index: int, kernel: str) -> nn.Module:
    first = (_conv(dim, merged_dim), GroupNorm(merged_dim, "relu", kernel))
    second = (_conv(merged_dim, merged_dim), GroupNorm(merged_dim, "relu", kernel))
    return _numbered((0, 1, 3, 4), *first, *second)


def _regular_part(dim: int, merged_dim: int, index: int, kernel: str) -> nn.Module:
    conv = [_conv(dim, merged_dim)] if index else []
    return nn.Sequential(*conv, GroupNorm(merged_dim, "relu", kernel))


def _pooled_part(dim: int, merged_dim: int, index: int, kernel: str) -> nn.Module:
    widen = [ChannelLinear(dim, merged_dim), GroupNorm(merged_dim, kernel=kernel)] if index else []
    return nn.Sequential(GroupNorm(dim, kernel=kernel), *widen)


def _numbered(names: Sequence[int], *layers: nn.Module) -> nn.Module:
    """Layers by the numbers that checkpoints know them by, which count activations too."""
    return nn.Sequential(OrderedDict((str(name), layer) for name, layer in zip(names, layers, strict=True)))


_PARTS: dict[str, Callable[[int, int, int, str], nn.Module]] = {
    "simple": _simple_part,
    "regular": _regular_part,
    "pooled": _pooled_part,
}
