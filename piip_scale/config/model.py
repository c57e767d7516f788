"""Config of the PIIP network: branches, interactions, pyramid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from piip_scale.config.base import Strict
from piip_scale.config.presets import expand_preset
from piip_scale.geometry import (
    GROUPS,
    NetworkGeometry,
    Section,
    Sections,
    block_windows,
    convnext_sections,
    depth_of,
    last_blocks,
    scaled_width,
    section_at,
    stage_blocks,
    stages_of_levels,
)

_SCALES = (4.0, 2.0, 1.0, 0.5)
"""Sizes over the source's grid that a pyramid can make."""

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
DropPathMode = Literal["zero", "skip"]


class _BranchConfig(Strict):
    """What every kind of branch says.

    Attributes:
        resolution_px: Image size this branch is meant for; only ratios between branches matter.
        blocks_per_stage: Blocks before each interaction; empty divides the depth evenly over ``num_stages``
            of the model. Their sum is the depth.
        drop_path_schedule: ``constant`` for every block (DeiT), or ``linear`` in the block's index (InternViT).
        pretrained: File of weights to start training from, in the format of the backbone's own release; see
            ``models.pretrained``.
        drop_path_mode: ``zero`` computes dropped residuals and multiplies by 0; ``skip`` leaves a fixed share of the
            batch's samples out of the computation, drawn anew for every residual.
        frozen_blocks: So many first blocks, and the embedding below them, are never updated and drop no paths; ``all``
            freezes the whole branch.
        checkpoint_blocks: Keep each block's input only and compute the block again in the backward pass; ``auto``
            decides at the start of a training by the plan's memory, and where nothing decides means yes.
    """

    resolution_px: Positive
    pretrained: str | None = None
    frozen_blocks: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    blocks_per_stage: tuple[Positive, ...] = ()
    drop_path_rate: Share = 0.0
    drop_path_schedule: Literal["constant", "linear"] = "constant"
    drop_path_mode: DropPathMode = "zero"
    checkpoint_blocks: bool | Literal["auto"] = False


class VitBranchConfig(_BranchConfig):
    """A plain vision transformer branch: DeiT, InternViT and their kin differ by these numbers only.

    Attributes:
        window_size_tokens: Window of each block, 0 for full attention; empty is full attention everywhere.
        pretrain_resolution_px: Image size of the position embedding's own grid.
        norm: ``rmsnorm`` is torch's own; ``apex_rmsnorm`` the same by NVIDIA's apex, where it is installed.
        key_bias: Whether the qkv bias has a part for keys (BEiT has none).
        qk_norm: Normalise queries and keys, as the tokens are, over the whole width before heads are split.
        layer_scale_init: Start of the per-channel scales, ``None`` for none.
        position_embedding: Learn a position for each cell of the grid.
        position_class_slot: The position embedding keeps a slot for a class token at index 0.
        frame_positions: Learned positions in time, of which an image takes the first (Uni-Perceiver).
        relative_position_bias: Learn a bias on the scores for every distance inside a window (BEiT).
        class_token: Carry a class token through the blocks; interactions leave it out.
        embedding_norm: Normalise the tokens before the first block (Uni-Perceiver).
    """

    kind: Literal["vit"] = "vit"
    embed_dim: Positive
    depth: Positive
    num_heads: Positive
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    patch_size_px: Positive = 16
    pretrain_resolution_px: Positive = 224
    window_size_tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    norm: Literal["layernorm", "rmsnorm", "apex_rmsnorm"] = "layernorm"
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    qkv_bias: bool = True
    key_bias: bool = True
    qk_norm: bool = False
    layer_scale_init: float | None = None
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    position_embedding: bool = True
    position_class_slot: bool = False
    frame_positions: Annotated[int, Field(ge=0)] = 0
    relative_position_bias: bool = False
    class_token: bool = False
    embedding_norm: bool = False

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

    @model_validator(mode="after")
    def _windows_agree(self) -> VitBranchConfig:
        windows = block_windows(self.window_size_tokens, self.depth)
        if self.class_token and any(windows):
            raise ValueError("class_token needs full attention: leave window_size_tokens empty")
        if self.relative_position_bias and not all(windows):
            raise ValueError("relative_position_bias needs a window in every block: set window_size_tokens")
        return self

    @property
    def sections(self) -> Sections:
        """Its blocks, all of one width and stride."""
        return (Section(self.depth, self.embed_dim, self.patch_size_px),)


class ConvNextBranchConfig(_BranchConfig):
    """A ConvNeXt branch. Its layers count in order, each later stage's downsampling as one of its own.

    Attributes:
        depths: Layers of each of its own four stages, downsampling left out.
        widths: Channels of each of its own stages.
    """

    kind: Literal["convnext"] = "convnext"
    depths: tuple[Positive, ...]
    widths: tuple[Positive, ...]
    layer_scale_init: float = 1e-6
    drop_path_schedule: Literal["constant", "linear"] = "linear"

    @model_validator(mode="after")
    def _numbers_agree(self) -> ConvNextBranchConfig:
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(f"depths={list(self.depths)} and widths={list(self.widths)} must name the same stages")
        depth = depth_of(self.sections)
        if self.blocks_per_stage and sum(self.blocks_per_stage) != depth:
            raise ValueError(
                f"blocks_per_stage={list(self.blocks_per_stage)} must add up to {depth}, the layers of "
                f"depths={list(self.depths)} and {len(self.depths) - 1} downsamplings"
            )
        return self

    @property
    def sections(self) -> Sections:
        """Its own stages, each later one's downsampling included."""
        return convnext_sections(self.depths, self.widths)


BranchConfig = Annotated[VitBranchConfig | ConvNextBranchConfig, Field(discriminator="kind")]


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
    drop_path_mode: DropPathMode = "zero"
    gamma_init: float = 0.0
    checkpoint_units: bool = False


class PyramidConfig(Strict):
    """What leaves the network for a detector.

    Attributes:
        kind: ``simple`` makes every level of the features after the last stage; ``regular`` takes each level after a
            stage of its own, as networks with ConvNeXt branches do.
        scales: Each level's size over the highest-resolution branch's grid (after the level's stage). In a simple
            pyramid largest first: with patches of 16 px, 4, 2, 1, 0.5 are strides 4, 8, 16, 32.
        stages: Of a regular pyramid, the stage (0-based) after which each level is taken; the last stage comes last.
        norm: Between the two doublings of a level of scale 4; the single-branch baselines use ``layernorm``.
    """

    kind: Literal["simple", "regular"] = "simple"
    scales: tuple[float, ...] = _SCALES
    stages: tuple[Annotated[int, Field(ge=0)], ...] = ()
    norm: Literal["groupnorm", "layernorm"] = "groupnorm"

    @model_validator(mode="after")
    def _levels_agree(self) -> PyramidConfig:
        scales, stages = list(self.scales), list(self.stages)
        if not set(scales) <= set(_SCALES):
            raise ValueError(f"scales={scales} must be among {list(_SCALES)}")
        if self.kind == "simple" and (not scales or scales != sorted(set(scales), reverse=True)):
            raise ValueError(f"scales={scales} must fall strictly and name at least one level")
        if self.kind == "simple" and stages:
            raise ValueError(f"stages={stages} belong to a regular pyramid: set kind to regular, or leave them out")
        if self.kind == "regular" and (not stages or len(stages) != len(scales) or stages != sorted(set(stages))):
            raise ValueError(f"stages={stages} must rise strictly and name one stage for each of scales={scales}")
        return self


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
