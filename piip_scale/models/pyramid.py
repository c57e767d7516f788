"""Feature maps of several strides from one."""

from __future__ import annotations

from torch import Tensor, nn

from piip_scale.config.model import GROUPS, PyramidConfig
from piip_scale.errors import ModelError
from piip_scale.models.branch import FeatureSpec
from piip_scale.models.layers import ConvTranspose2d


class SimplePyramid(nn.Module):
    """A map enlarged by transposed convolutions and shrunk by pooling, every level from the same source.

    Args:
        config: The levels.
        source: Width and stride of the map.

    Source: Li et al., Exploring Plain Vision Transformer Backbones for Object Detection, with GroupNorm for LayerNorm.
    """

    def __init__(self, config: PyramidConfig, source: FeatureSpec) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_level(scale, source.channels) for scale in config.scales)
        self.smallest_scale = min(config.scales)
        self.feature_specs = tuple(
            FeatureSpec(source.channels, int(source.stride_px / scale)) for scale in config.scales
        )

    def forward(self, map_BCHW: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) to one float32 map a level, largest first.

        Raises:
            ModelError: A level would have no cells.
        """
        height, width = map_BCHW.shape[-2:]
        if min(height, width) * self.smallest_scale < 1:
            raise ModelError(
                "image too small for the feature pyramid",
                value=f"{height}x{width} tokens",
                rule=f"both sides must be at least {1 / self.smallest_scale:g} tokens of the last branch",
            )
        return tuple(level(map_BCHW).float().contiguous() for level in self.levels)


def _level(scale: float, dim: int) -> nn.Module:
    if scale == 4.0:
        return nn.Sequential(_double(dim), nn.GroupNorm(GROUPS, dim), nn.GELU(), _double(dim))
    if scale == 2.0:
        return nn.Sequential(_double(dim))
    return nn.Sequential(nn.MaxPool2d(kernel_size=2, stride=2) if scale == 0.5 else nn.Identity())


def _double(dim: int) -> nn.Module:
    return ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
