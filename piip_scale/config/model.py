"""Config of the whole PIIP network, and the rules between its branches, interactions and pyramid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import field_validator, model_validator

from piip_scale.config.base import Positive, Strict
from piip_scale.config.branches import BranchConfig, VitBranchConfig
from piip_scale.config.interaction import InteractionConfig
from piip_scale.config.presets import expand_preset
from piip_scale.config.pyramid import PyramidConfig
from piip_scale.geometry import (
    GROUPS,
    NetworkGeometry,
    depth_of,
    last_blocks,
    scaled_width,
    section_at,
    stage_blocks,
    stages_of_levels,
)


@dataclass(frozen=True)
class Kernels:
    """Names of the implementations that a network computes with.

    Attributes:
        attention: See ``ops.attention``.
        deform: See ``ops.deform_attention``.
        fused: See ``ops.fused``.
    """

    attention: str = "auto"
    deform: str = "auto"
    fused: str = "auto"


AUTO_KERNELS = Kernels()


class PiipConfig(Strict):
    """A PIIP network: branches with the largest model (lowest resolution) first.

    ``deform_kernel`` and ``attention_kernel`` choose an implementation by name; ``auto`` takes the fastest present.
    ``fused_kernel`` does so for what stands between matrix products: ``plain`` is torch's operators one by one,
    ``triton`` one kernel for each group of them.
    ``pretrained`` is a file of the whole model's weights, or of the network's alone, to start training from; branches'
    own files are not read then. What ``reset`` names of it starts afresh: the layers of the ``classes``, or neck and
    ``heads``.
    """

    branches: tuple[BranchConfig, ...]
    interaction: InteractionConfig = InteractionConfig(num_stages=1)
    pyramid: PyramidConfig = PyramidConfig()
    pretrained: str | None = None
    reset: tuple[Literal["classes", "heads"], ...] = ()
    attention_kernel: Literal["auto", "math", "sdpa", "cudnn", "flash"] = "auto"
    deform_kernel: Literal["auto", "reference", "triton"] = "auto"
    fused_kernel: Literal["auto", "plain", "triton"] = "auto"

    @property
    def kernels(self) -> Kernels:
        """Its kernels' names."""
        return Kernels(self.attention_kernel, self.deform_kernel, self.fused_kernel)

    @property
    def geometry(self) -> NetworkGeometry:
        """Stages, widths, strides and levels that these values make."""
        stages, pyramid = self.interaction.num_stages, self.pyramid
        return NetworkGeometry(
            resolutions_px=tuple(b.resolution_px for b in self.branches),
            sections=tuple(b.sections for b in self.branches),
            blocks_per_stage=tuple(stage_blocks(b.blocks_per_stage, b.sections, stages) for b in self.branches),
            level_stages=stages_of_levels(pyramid.stages, len(pyramid.scales), stages),
            level_scales=pyramid.scales,
        )

    @model_validator(mode="after")
    def _reset_of_something(self) -> PiipConfig:
        if self.reset and self.pretrained is None:
            raise ValueError(
                f"reset={list(self.reset)} says what of pretrained starts afresh: set pretrained to a file, or leave "
                "reset out"
            )
        return self

    @field_validator("branches", mode="before")
    @classmethod
    def _expand_presets(cls, branches: object) -> object:
        if not isinstance(branches, tuple | list):
            return branches
        return tuple({"kind": "vit"} | expand_preset(b) if isinstance(b, dict) else b for b in branches)

    @model_validator(mode="after")
    def _flash_has_no_bias(self) -> PiipConfig:
        biased = [i for i, b in enumerate(self.branches) if isinstance(b, VitBranchConfig) and b.relative_position_bias]
        if biased and self.attention_kernel == "flash":
            raise ValueError(
                f"attention_kernel=flash cannot add the relative_position_bias of branches.{biased[0]}; "
                "auto uses flash wherever it can"
            )
        return self

    @model_validator(mode="after")
    def _branches_agree(self) -> PiipConfig:
        if not self.branches:
            raise ValueError("branches is empty and must name at least one branch")
        sizes = [b.resolution_px for b in self.branches]
        if sizes != sorted(sizes):
            raise ValueError(f"branches see {sizes} px and must rise: the largest model, at the lowest, comes first")
        for index, branch in enumerate(self.branches):
            self._check_stages(index, branch)
            self._check_frozen(index, branch)
            self._check_heads(index, branch)
        self._check_pyramid()
        return self

    def _check_stages(self, index: int, branch: BranchConfig) -> None:
        stages, depth = self.interaction.num_stages, depth_of(branch.sections)
        if branch.blocks_per_stage and len(branch.blocks_per_stage) != stages:
            raise ValueError(
                f"branches.{index}.blocks_per_stage has {len(branch.blocks_per_stage)} stages and must have "
                f"interaction.num_stages={stages}"
            )
        if not branch.blocks_per_stage and depth % stages:
            raise ValueError(
                f"interaction.num_stages={stages} must divide branches.{index}.depth={depth}, "
                "or blocks_per_stage must be given"
            )

    def _check_frozen(self, index: int, branch: BranchConfig) -> None:
        depth = depth_of(branch.sections)
        if branch.frozen_blocks != "all" and branch.frozen_blocks > depth:
            raise ValueError(
                f"branches.{index}.frozen_blocks={branch.frozen_blocks} must be at most depth={depth}, "
                "or 'all' for the whole branch"
            )

    def _check_heads(self, index: int, branch: BranchConfig) -> None:
        unit = self.interaction
        for last in last_blocks(stage_blocks(branch.blocks_per_stage, branch.sections, unit.num_stages)):
            dim = section_at(branch.sections, last).width
            width = scaled_width(dim, unit.value_ratio) if unit.attention == "deform" else dim
            if len(self.branches) > 1 and (width % unit.num_heads or not width):
                raise ValueError(
                    f"interaction.num_heads={unit.num_heads} must divide {width}, the attention width of "
                    f"branches.{index} (embed_dim={dim})"
                )

    def _check_pyramid(self) -> None:
        geometry = self.geometry
        levels = list(zip(geometry.level_stages, geometry.level_scales, strict=True))
        if self.pyramid.kind == "regular" and levels[-1][0] != self.interaction.num_stages - 1:
            raise ValueError(
                f"pyramid.stages={list(self.pyramid.stages)} must end with the last stage, "
                f"{self.interaction.num_stages - 1}"
            )
        for stage, scale in levels:
            merged = geometry.section_after(0, stage).width
            if merged % GROUPS and (len(self.branches) > 1 or scale == 4.0):
                raise ValueError(
                    f"branches.0.embed_dim={merged} must be a multiple of {GROUPS}, the groups of the merged norms"
                )
            stride = geometry.section_after(-1, stage).stride_px
            if (stride / scale) % 1:
                raise ValueError(f"pyramid.scales={scale} must give a whole stride: the last branch's is {stride} px")


class ClassifierConfig(Strict):
    """A classification head over the branches.

    Attributes:
        separate: A norm and a linear head for every branch, logits averaged; otherwise one head over the mean of the
            merged features.
    """

    num_classes: Positive
    separate: bool = True
