"""Feature maps of several strides from merged features."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from piip_scale.config.pyramid import PyramidConfig
from piip_scale.errors import ModelError
from piip_scale.geometry import level_stride_px
from piip_scale.models.branch import FeatureSpec
from piip_scale.models.layers import NORM_EPS, Doubling, GroupNorm


class Pyramid(nn.Module):
    """Maps enlarged by transposed convolutions or shrunk by pooling, one a level.

    Args:
        config: The levels.
        sources: Width and stride of the map that each level is made of.
        kernel: Name of the fused kernel, see ``ops.fused``.

    Source: Li et al., Exploring Plain Vision Transformer Backbones for Object Detection.
    """

    def __init__(self, config: PyramidConfig, sources: Sequence[FeatureSpec], kernel: str = "auto") -> None:
        super().__init__()
        self.scales = config.scales
        self.levels = nn.ModuleList(
            _level(scale, source.channels, config.norm, kernel)
            for scale, source in zip(config.scales, sources, strict=True)
        )
        self.feature_specs = tuple(
            FeatureSpec(source.channels, level_stride_px(source.stride_px, scale))
            for scale, source in zip(config.scales, sources, strict=True)
        )

    def forward(self, *maps_BCHW: Tensor) -> tuple[Tensor, ...]:
        """One source (B, C, H, W) a level to one float32 map a level, channels together in memory.

        Raises:
            ModelError: A level would have no cells.
        """
        for scale, map_BCHW in zip(self.scales, maps_BCHW, strict=True):
            _check_cells(scale, map_BCHW)
        return tuple(level(map_BCHW).float() for level, map_BCHW in zip(self.levels, maps_BCHW, strict=True))


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of a map, and GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=NORM_EPS)
        self.activation = nn.GELU()

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        activated_BHWC: Tensor = self.activation(super().forward(map_BCHW.permute(0, 2, 3, 1)))
        return activated_BHWC.permute(0, 3, 1, 2)


def _check_cells(scale: float, map_BCHW: Tensor) -> None:
    height, width = map_BCHW.shape[-2:]
    if min(height, width) * scale < 1:
        raise ModelError(
            "image too small for the feature pyramid",
            value=f"{height}x{width} tokens",
            rule=f"both sides must be at least {1 / scale:g} tokens of the last branch",
        )


def _level(scale: float, dim: int, norm: str, kernel: str) -> nn.Module:
    # The last step of a level writes what leaves the network.
    last = Doubling(dim, dtype_out=torch.float32)
    if scale == 4.0:
        between = GroupNorm(dim, "gelu", kernel) if norm == "groupnorm" else ChannelNorm(dim)
        # The numbers that checkpoints know the layers by, which count the activation too.
        return nn.Sequential(OrderedDict([("0", Doubling(dim)), ("1", between), ("3", last)]))
    if scale == 2.0:
        return nn.Sequential(last)
    return nn.Sequential(nn.MaxPool2d(kernel_size=2, stride=2) if scale == 0.5 else nn.Identity())
