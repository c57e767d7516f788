"""Feature maps of several strides from merged features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from piip_scale.config.model import PyramidConfig
from piip_scale.errors import ModelError
from piip_scale.geometry import GROUPS, level_stride_px
from piip_scale.models.branch import FeatureSpec
from piip_scale.models.layers import NORM_EPS, ConvTranspose2d


class Pyramid(nn.Module):
    """Maps enlarged by transposed convolutions or shrunk by pooling, one a level.

    Args:
        config: The levels.
        sources: Width and stride of the map that each level is made of.

    Source: Li et al., Exploring Plain Vision Transformer Backbones for Object Detection.
    """

    def __init__(self, config: PyramidConfig, sources: Sequence[FeatureSpec]) -> None:
        super().__init__()
        self.scales = config.scales
        self.levels = nn.ModuleList(
            _level(scale, source.channels, config.norm) for scale, source in zip(config.scales, sources, strict=True)
        )
        self.feature_specs = tuple(
            FeatureSpec(source.channels, level_stride_px(source.stride_px, scale))
            for scale, source in zip(config.scales, sources, strict=True)
        )

    def forward(self, *maps_BCHW: Tensor) -> tuple[Tensor, ...]:
        """One source (B, C, H, W) a level to one float32 map a level.

        Raises:
            ModelError: A level would have no cells.
        """
        for scale, map_BCHW in zip(self.scales, maps_BCHW, strict=True):
            _check_cells(scale, map_BCHW)
        return tuple(
            level(map_BCHW).float().contiguous() for level, map_BCHW in zip(self.levels, maps_BCHW, strict=True)
        )


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of a map."""

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return super().forward(map_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _check_cells(scale: float, map_BCHW: Tensor) -> None:
    height, width = map_BCHW.shape[-2:]
    if min(height, width) * scale < 1:
        raise ModelError(
            "image too small for the feature pyramid",
            value=f"{height}x{width} tokens",
            rule=f"both sides must be at least {1 / scale:g} tokens of the last branch",
        )


def _level(scale: float, dim: int, norm: str) -> nn.Module:
    if scale == 4.0:
        between = nn.GroupNorm(GROUPS, dim) if norm == "groupnorm" else ChannelNorm(dim, eps=NORM_EPS)
        return nn.Sequential(_double(dim), between, nn.GELU(), _double(dim))
    if scale == 2.0:
        return nn.Sequential(_double(dim))
    return nn.Sequential(nn.MaxPool2d(kernel_size=2, stride=2) if scale == 0.5 else nn.Identity())


def _double(dim: int) -> nn.Module:
    return ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
