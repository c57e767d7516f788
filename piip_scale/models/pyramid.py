"""Feature maps of several strides from one."""

from __future__ import annotations

from torch import Tensor, nn

from piip_scale.config.model import PyramidConfig
from piip_scale.models.branch import FeatureSpec
from piip_scale.models.layers import GROUP_NORM_GROUPS, ConvTranspose2d


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
        self.feature_specs = tuple(
            FeatureSpec(source.channels, int(source.stride_px / scale)) for scale in config.scales
        )

    def forward(self, map_BCHW: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) to one float32 map a level, largest first."""
        return tuple(level(map_BCHW).float().contiguous() for level in self.levels)


def _level(scale: float, dim: int) -> nn.Module:
    levels: dict[float, tuple[nn.Module, ...]] = {
        4.0: (_double(dim), nn.GroupNorm(GROUP_NORM_GROUPS, dim), nn.GELU(), _double(dim)),
        2.0: (_double(dim),),
        1.0: (nn.Identity(),),
        0.5: (nn.MaxPool2d(kernel_size=2, stride=2),),
    }
    return nn.Sequential(*levels[scale])


def _double(dim: int) -> nn.Module:
    return ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
