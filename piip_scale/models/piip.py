"""The parameter-inverted image pyramid network for dense prediction, for any number of branches."""

from __future__ import annotations

from torch import Tensor, nn

from piip_scale.config.model import PiipConfig
from piip_scale.models.branch import BranchState, FeatureSpec
from piip_scale.models.merging import Merging, NoMerging
from piip_scale.models.pyramid import Pyramid
from piip_scale.models.trunk import Trunk


class PIIP(Trunk):
    """A trunk whose branches are merged into a feature pyramid.

    Built inside ``torch.device("meta")`` it takes no memory. Each module with parameters has a ``reset_parameters``
    that draws those and no others.

    Args:
        config: The network.

    Raises:
        KernelError: A kernel that the config names is not installed.

    Source: Zhu et al., Parameter-Inverted Image Pyramid Networks.
    """

    def __init__(self, config: PiipConfig) -> None:
        super().__init__(config)
        levels = self.geometry.level_stages
        stages = sorted(set(levels))
        self.mergings = nn.ModuleList(self._build_merging(stage) for stage in stages)
        sources = [self._merged_spec(stage) for stage in levels]
        self.pyramid = Pyramid(config.pyramid, sources, config.fused_kernel)

    @property
    def feature_specs(self) -> tuple[FeatureSpec, ...]:
        """Channels and stride of every map ``forward`` returns, strides in pixels of its input."""
        return self.pyramid.feature_specs

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Features of a batch of images.

        Args:
            image_BCHW: Normalised images (B, 3, H, W) at the last branch's resolution, any height and width of at
                least one token in every branch and one cell in every level.

        Returns:
            One float32 map (B, channels, H / stride, W / stride) per entry of ``feature_specs``, channels together in
            memory.

        Raises:
            ModelError: The images are too small.
        """
        merged: dict[int, Tensor] = {}
        for stage, states in enumerate(self.walk(image_BCHW)):
            if stage in self.geometry.level_stages:
                merged[stage] = self._merge(len(merged), states)
        features: tuple[Tensor, ...] = self.pyramid(*(merged[stage] for stage in self.geometry.level_stages))
        return features

    def call_order(self) -> list[list[nn.Module]]:
        """See ``Trunk.call_order``."""
        return [*super().call_order(), [self.pyramid]]

    def _stage_modules(self, stage: int) -> list[list[nn.Module]]:
        merged = sorted(set(self.geometry.level_stages))
        mergings = [[self.mergings[merged.index(stage)]]] if stage in merged else []
        return super()._stage_modules(stage) + mergings

    def _merge(self, index: int, states: list[BranchState]) -> Tensor:
        merged_BCHW: Tensor = self.mergings[index](*(state.grid_BHWC for state in states))
        return merged_BCHW

    def _build_merging(self, stage: int) -> nn.Module:
        dims = [spec.channels for spec in self.specs_after(stage)]
        return Merging(dims, self.config.pyramid.kind, self.config.fused_kernel) if len(dims) > 1 else NoMerging()

    def _merged_spec(self, stage: int) -> FeatureSpec:
        specs = self.specs_after(stage)
        return FeatureSpec(specs[0].channels, specs[-1].stride_px)
