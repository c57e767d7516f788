"""Configs of the kinds of branches: a row of BranchConfig each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from piip_scale.config.base import DropPathMode, Positive, Share, Strict
from piip_scale.geometry import Section, Sections, block_windows, convnext_sections, depth_of, scaled_width

Deviation = Annotated[float, Field(gt=0)]
Statistics = tuple[float, float, float]
PositionResize = Literal["bicubic", "bilinear", "crop", "tile"]
_ROTARY_CHANNELS = 4
"""A pair of channels for rows and one for columns."""


class LoraConfig(Strict):
    """Low-rank additions to linear layers, which are all that is trained of a branch then.

    Attributes:
        rank: Channels between the two factors.
        alpha: What the addition is multiplied by, times the rank.
        targets: Layers that get one: an attention's ``qkv`` and ``proj``, and those of the ``mlp``.
    """

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 16.0
    targets: Annotated[tuple[Literal["qkv", "proj", "mlp"], ...], Field(min_length=1)] = ("qkv", "proj")

    @property
    def scale(self) -> float:
        """The addition's factor."""
        return self.alpha / self.rank


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
        released_as: Where the hub has weights for these numbers, to say so where a file is absent.
        mean: Of pixels, 0 to 255, red first, that its pretraining subtracted; without, ``data.augment.mean``. With its
            own a branch sees its image in them, and padding as the run's mean colour.
        std: What it divided by, likewise; both or neither.
    """

    resolution_px: Positive
    pretrained: str | None = None
    frozen_blocks: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    blocks_per_stage: tuple[Positive, ...] = ()
    drop_path_rate: Share = 0.0
    drop_path_schedule: Literal["constant", "linear"] = "constant"
    drop_path_mode: DropPathMode = "zero"
    checkpoint_blocks: bool | Literal["auto"] = False
    released_as: str | None = None
    mean: Statistics | None = None
    std: tuple[Deviation, Deviation, Deviation] | None = None

    @model_validator(mode="after")
    def _statistics_are_whole(self) -> _BranchConfig:
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean={self.mean} and std={self.std} belong together: set both, or leave both out")
        return self


class RotaryConfig(Strict):
    """Rotary positions: queries and keys of cells are turned by angles that follow from where the cells lie.

    Half of a head's channels turn with the row and half with the column, in pairs, each pair more slowly than the one
    before it. Class and register tokens are not turned.

    Attributes:
        base: The slowest pair's period over the fastest's.
        coordinates: ``centred`` puts an image's edges at -1 and 1, a unit for a turn (DINOv3); ``cells`` counts cells.
        normalise: What a coordinate is divided by: its own side of the grid, or for both the ``shorter`` or ``longer``.
        pretrain_grid_cells: With ``cells``, any grid spans as many of them as this; 0 leaves coordinates as they are.
        offset_cells: With ``cells``, the first cell's coordinate, before it is rescaled.
        first: Whether ``rows`` or ``columns`` turn the first of the pairs.
        pairs: Channels that turn together: ``neighbours``, or the same places of both ``halves`` of a head.
        windows: Blocks with windows take the places that cells have in the ``image``, or those in the ``window``, as
            if that were the image.
        rescale: In training, all coordinates are multiplied by one number between its inverse and this, drawn for each
            batch; 1 draws nothing.
    """

    base: Annotated[float, Field(gt=1)] = 100.0
    coordinates: Literal["centred", "cells"] = "centred"
    normalise: Literal["own", "shorter", "longer"] = "own"
    pretrain_grid_cells: Annotated[int, Field(ge=0)] = 0
    offset_cells: float = 0.0
    first: Literal["rows", "columns"] = "rows"
    pairs: Literal["neighbours", "halves"] = "halves"
    windows: Literal["image", "window"] = "image"
    rescale: Annotated[float, Field(ge=1)] = 1.0

    @model_validator(mode="after")
    def _cells_agree(self) -> RotaryConfig:
        if self.coordinates == "centred" and (self.pretrain_grid_cells or self.offset_cells):
            raise ValueError(
                "rotary.pretrain_grid_cells and rotary.offset_cells are for counted cells: set rotary.coordinates to "
                "cells, or leave them out"
            )
        return self


class VitBranchConfig(_BranchConfig):
    """A vision transformer branch: DeiT, InternViT, DINOv3, EVA-02 and their kin differ by these numbers only.

    Attributes:
        window_size_tokens: Window of each block, 0 for full attention; empty is full attention everywhere.
        pretrain_resolution_px: Image size of the position embedding's own grid.
        norm: ``rmsnorm`` is torch's own; ``apex_rmsnorm`` the same by NVIDIA's apex, where it is installed.
        key_bias: Whether the qkv bias has a part for keys (BEiT has none).
        proj_bias: Whether the projection behind attention has a bias.
        qk_norm: Normalise queries and keys, as the tokens are: ``True`` over the whole width before heads are split,
            ``head`` in each head.
        feed_forward: ``mlp``, two layers around an activation; or ``swiglu``, whose first is two, the one times SiLU of
            the other.
        mlp_ratio: The feed-forward's hidden width over the branch's.
        mlp_multiple: The hidden width is rounded up to a multiple of this.
        mlp_bias: Whether the feed-forward's layers have biases.
        mlp_norm: Normalise the hidden tokens of a ``swiglu`` (EVA-02).
        activation: Of an ``mlp``: GELU, exact or by tanh.
        layer_scale_init: Start of the per-channel scales, ``None`` for none.
        position_embedding: Learn a position for each cell of the grid.
        position_resize: How positions come to another grid: ``bicubic`` and ``bilinear`` (PE) stretch them, ``crop``
            stretches them to a square over its longer side and takes what lies on it, bilinear (RADIO), ``tile``
            repeats them (SAM 3).
        position_class_slot: The position embedding keeps a slot for a class token at index 0.
        frame_positions: Learned positions in time, of which an image takes the first (Uni-Perceiver).
        relative_position_bias: Learn a bias on the scores for every distance inside a window (BEiT).
        rotary: Rotary positions, ``None`` for none; learned ones may stand beside them.
        class_token: Carry a class token through the blocks; interactions leave it out.
        register_tokens: Carry as many more tokens behind it. In a block with windows such tokens see the whole image,
            and each window sees them.
        patch_bias: Whether the projection of patches has a bias.
        embedding_norm: Normalise all tokens before the first block (Uni-Perceiver, PE, SAM 3).
        frozen_dtype: Of the weights of linear layers in frozen blocks: ``run`` as in all others, or in 8 bits with a
            scale for each output channel, ``int8`` or ``fp8`` (e4m3), which halves their memory and rounds them.
        lora: Freezes the branch and trains low-rank additions to its blocks above ``frozen_blocks`` in its place.
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
    proj_bias: bool = True
    qk_norm: bool | Literal["head"] = False
    feed_forward: Literal["mlp", "swiglu"] = "mlp"
    mlp_multiple: Positive = 1
    mlp_bias: bool = True
    mlp_norm: bool = False
    layer_scale_init: float | None = None
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    position_embedding: bool = True
    position_resize: PositionResize = "bicubic"
    position_class_slot: bool = False
    frame_positions: Annotated[int, Field(ge=0)] = 0
    relative_position_bias: bool = False
    rotary: RotaryConfig | None = None
    class_token: bool = False
    register_tokens: Annotated[int, Field(ge=0)] = 0
    patch_bias: bool = True
    embedding_norm: bool = False
    frozen_dtype: Literal["run", "int8", "fp8"] = "run"
    lora: LoraConfig | None = None

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
    def _stored_is_frozen(self) -> VitBranchConfig:
        if self.frozen_dtype != "run" and not self.frozen_blocks and self.lora is None:
            raise ValueError(
                f"frozen_dtype={self.frozen_dtype!r} is of frozen blocks, and there are none: set frozen_blocks or "
                "lora, or leave frozen_dtype out"
            )
        return self

    @model_validator(mode="after")
    def _lora_has_blocks(self) -> VitBranchConfig:
        if self.lora is not None and self.frozen_blocks in ("all", self.depth):
            raise ValueError(
                f"lora trains the blocks above frozen_blocks={self.frozen_blocks!r}, which are none: leave "
                "frozen_blocks out, or name fewer"
            )
        if self.lora is not None and self.lora.rank > self.embed_dim:
            raise ValueError(f"lora.rank={self.lora.rank} must be at most embed_dim={self.embed_dim}, a full rank")
        return self

    @model_validator(mode="after")
    def _windows_agree(self) -> VitBranchConfig:
        windows = block_windows(self.window_size_tokens, self.depth)
        if self.relative_position_bias and self.prefix_tokens:
            raise ValueError("relative_position_bias knows cells only: leave class_token and register_tokens out")
        if self.relative_position_bias and not all(windows):
            raise ValueError("relative_position_bias needs a window in every block: set window_size_tokens")
        return self

    @model_validator(mode="after")
    def _parts_agree(self) -> VitBranchConfig:
        head_size = self.embed_dim // self.num_heads
        if self.rotary is not None and head_size % _ROTARY_CHANNELS:
            raise ValueError(
                f"rotary turns pairs of channels by row and by column: embed_dim={self.embed_dim} over "
                f"num_heads={self.num_heads} must be a multiple of {_ROTARY_CHANNELS}"
            )
        if self.mlp_norm and self.feed_forward != "swiglu":
            raise ValueError("mlp_norm is for a feed_forward of swiglu: set feed_forward, or leave mlp_norm out")
        return self

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the grid's cells: class and registers."""
        return int(self.class_token) + self.register_tokens

    @property
    def hidden_dim(self) -> int:
        """The feed-forward's hidden width."""
        width = scaled_width(self.embed_dim, self.mlp_ratio)
        return -(-width // self.mlp_multiple) * self.mlp_multiple

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
