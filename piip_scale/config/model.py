"""Config of the PIIP network: branches, interactions, pyramid."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from piip_scale.config.base import Strict
from piip_scale.config.presets import expand_preset

GROUPS = 32
"""Groups of every group norm."""

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class VitBranchConfig(Strict):
    """A plain vision transformer branch: DeiT, InternViT and their kin differ by these numbers only.

    Attributes:
        resolution_px: Image size this branch is meant for; only ratios between branches matter.
        blocks_per_stage: Blocks before each interaction; empty divides ``depth`` evenly over ``num_stages``
            of the model. Their sum is ``depth``.
        window_size_tokens: Window of each block, 0 for full attention; empty is full attention everywhere.
        pretrain_resolution_px: Image size of the position embedding's own grid.
        qk_norm: RMS-normalise queries and keys over the whole width before heads are split.
        layer_scale_init: Start of the per-channel scales, ``None`` for none.
        position_class_slot: The position embedding keeps a slot for a class token at index 0.
        drop_path_schedule: ``constant`` for every block (DeiT), or ``linear`` in the block's index (InternViT).
    """

    kind: Literal["vit"] = "vit"
    resolution_px: Positive
    embed_dim: Positive
    depth: Positive
    num_heads: Positive
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    patch_size_px: Positive = 16
    pretrain_resolution_px: Positive = 224
    blocks_per_stage: tuple[Positive, ...] = ()
    window_size_tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale_init: float | None = None
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    position_class_slot: bool = False
    drop_path_rate: Share = 0.0
    drop_path_schedule: Literal["constant", "linear"] = "constant"
    checkpoint_blocks: bool = False

    @model_validator(mode="after")
    def _numbers_agree(self) -> VitBranchConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide embed_dim={self.embed_dim}")
        if self.pretrain_resolution_px < self.patch_size_px:
            raise ValueError(
                f"pretrain_resolution_px={self.pretrain_resolution_px} must be at least "
                f"patch_size_px={self.patch_size_px}"
            )
        if self.blocks_per_stage and sum(self.blocks_per_stage) != self.depth:
            raise ValueError(f"blocks_per_stage={list(self.blocks_per_stage)} must add up to depth={self.depth}")
        if self.window_size_tokens and len(self.window_size_tokens) != self.depth:
            raise ValueError(
                f"window_size_tokens names {len(self.window_size_tokens)} blocks and must name depth={self.depth}"
            )
        return self


BranchConfig = VitBranchConfig


class InteractionConfig(Strict):
    """The units that join neighbouring branches after each stage.

    Attributes:
        num_stages: Stages, each of blocks and then units.
        attention: ``deform`` (deformable attention, one level) or ``cross`` (plain cross-attention).
        value_ratio: Width of the deformable attention's values over the query's width.
        ffn_ratio: Hidden width of the unit's feed-forward over the query's width; 0 leaves it out.
        projection: Project the other branch's features to the query's width first.
        gamma_init: Start of both residual scales; 0 makes every branch start as itself alone.
    """

    num_stages: Positive
    attention: Literal["deform", "cross"] = "deform"
    num_heads: Positive = 16
    num_points: Positive = 4
    value_ratio: Annotated[float, Field(gt=0)] = 0.5
    ffn_ratio: Annotated[float, Field(ge=0)] = 0.25
    projection: bool = True
    norm: Literal["layernorm", "none"] = "layernorm"
    drop_path_rate: Share = 0.0
    gamma_init: float = 0.0
    checkpoint_units: bool = False


class PyramidConfig(Strict):
    """What leaves the network for a detector.

    Attributes:
        scales: Each level's size over the highest-resolution branch's token grid, largest first; with
            patches of 16 px, 4, 2, 1, 0.5 are strides 4, 8, 16, 32.
    """

    kind: Literal["simple"] = "simple"
    scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)

    @field_validator("scales", mode="after")
    @classmethod
    def _falling(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if not scales or list(scales) != sorted(set(scales), reverse=True):
            raise ValueError(f"scales={list(scales)} must fall strictly and name at least one level")
        if not set(scales) <= {4.0, 2.0, 1.0, 0.5}:
            raise ValueError(f"scales={list(scales)} must be some of 4, 2, 1 and 0.5")
        return scales


class PiipConfig(Strict):
    """A PIIP network: branches with the largest model (lowest resolution) first.

    ``deform_kernel`` and ``attention_kernel`` choose an implementation by name; ``auto`` takes the fastest present.
    """

    branches: tuple[BranchConfig, ...]
    interaction: InteractionConfig = InteractionConfig(num_stages=1)
    pyramid: PyramidConfig = PyramidConfig()
    attention_kernel: Literal["auto", "math", "sdpa", "flash"] = "auto"
    deform_kernel: Literal["auto", "reference", "triton"] = "auto"

    @field_validator("branches", mode="before")
    @classmethod
    def _expand_presets(cls, branches: object) -> object:
        if not isinstance(branches, tuple | list):
            return branches
        return tuple(expand_preset(b) if isinstance(b, dict) else b for b in branches)

    @model_validator(mode="after")
    def _branches_agree(self) -> PiipConfig:
        if not self.branches:
            raise ValueError("branches is empty and must name at least one branch")
        sizes = [b.resolution_px for b in self.branches]
        if sizes != sorted(sizes):
            raise ValueError(f"branches see {sizes} px and must rise: the largest model, at the lowest, comes first")
        for index, branch in enumerate(self.branches):
            self._check_branch(index, branch)
        merged = self.branches[0].embed_dim
        if merged % GROUPS and (len(self.branches) > 1 or 4.0 in self.pyramid.scales):
            raise ValueError(
                f"branches.0.embed_dim={merged} must be a multiple of {GROUPS}, the groups of the merged norms"
            )
        stride = self.branches[-1].patch_size_px
        broken = [scale for scale in self.pyramid.scales if (stride / scale) % 1]
        if broken:
            raise ValueError(f"pyramid.scales={broken} must give whole strides: the last branch's is {stride} px")
        return self

    def _check_branch(self, index: int, branch: BranchConfig) -> None:
        stages, unit = self.interaction.num_stages, self.interaction
        if branch.blocks_per_stage and len(branch.blocks_per_stage) != stages:
            raise ValueError(
                f"branches.{index}.blocks_per_stage has {len(branch.blocks_per_stage)} stages and must have "
                f"interaction.num_stages={stages}"
            )
        if not branch.blocks_per_stage and branch.depth % stages:
            raise ValueError(
                f"interaction.num_stages={stages} must divide branches.{index}.depth={branch.depth}, "
                "or blocks_per_stage must be given"
            )
        width = int(branch.embed_dim * (unit.value_ratio if unit.attention == "deform" else 1.0))
        if len(self.branches) > 1 and width % unit.num_heads:
            raise ValueError(
                f"interaction.num_heads={unit.num_heads} must divide {width}, the attention width of "
                f"branches.{index} (embed_dim={branch.embed_dim})"
            )

    def blocks_per_stage(self, branch: int) -> tuple[int, ...]:
        """Blocks that branch ``branch`` runs in each stage."""
        config, stages = self.branches[branch], self.interaction.num_stages
        return config.blocks_per_stage or (config.depth // stages,) * stages
