"""Config of a run: detector, data, optimisation, sharding, and when to save, look and evaluate."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from piip_scale.config.base import Strict
from piip_scale.config.model import PiipConfig, Positive

Rate = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[int, Field(ge=0)]
Rgb = tuple[float, float, float]
PositiveFloat = Annotated[float, Field(gt=0)]


class DetectorConfig(Strict):
    """The mmdet detector on top of the network.

    Attributes:
        kind: Which of mmdet's own base configs to start from.
        overrides: Merged onto that mmdet model dict, in mmdet's own terms:
            ``{"rpn_head.anchor_generator.scales": [4]}`` or nested dicts.
    """

    kind: Literal["mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "dino"]
    overrides: dict[str, Any] = {}


class CropFirstConfig(Strict):
    """The second way of DETR's recipes: an image is resized and a part of it cut out before it is resized as usual.

    Attributes:
        short_edge_px: Candidate short edges of the first resize; the long edge has the usual bound.
        crop_range_px: Height and width of the part are drawn from this range, ends included, each by itself.
        probability: Share of the training images that go this way.
    """

    short_edge_px: tuple[Positive, ...]
    crop_range_px: tuple[Positive, Positive]
    probability: Rate = 0.5

    @model_validator(mode="after")
    def _ranges_hold_something(self) -> CropFirstConfig:
        if not self.short_edge_px:
            raise ValueError("short_edge_px is empty and must name at least one size")
        if self.crop_range_px[0] > self.crop_range_px[1]:
            raise ValueError(f"crop_range_px={list(self.crop_range_px)} must be low <= high")
        return self


class AugmentConfig(Strict):
    """How an image becomes network input. Without jitter the short edge takes the single size given.

    Attributes:
        short_edge_px: Candidate short edges, one drawn per training image; evaluation takes the last.
        max_edge_px: The long edge is never longer.
        crop_first: What a share of the training images goes through before that.
        jitter_scale: Large-scale jitter, a range of factors, instead of ``short_edge_px``; then ``crop_px`` is needed.
        crop_px: Height and width of a random crop of the resized image; an image that is smaller stays whole. Under
            jitter every batch has this size.
        recompute_boxes: The box of an object that a crop cuts becomes that of its remaining mask, where it has one;
            otherwise it is cut itself.
        flip_probability: Of mirroring left and right.
        pad_multiple_px: Both sides of a batch are multiples of it.
        mean: Subtracted from the channels, 0 to 255, red first.
        std: Divides them after that.
    """

    short_edge_px: tuple[Positive, ...] = (800,)
    max_edge_px: Positive = 1333
    crop_first: CropFirstConfig | None = None
    jitter_scale: tuple[float, float] | None = None
    crop_px: tuple[Positive, Positive] | None = None
    recompute_boxes: bool = True
    flip_probability: Rate = 0.5
    pad_multiple_px: Positive = 64
    mean: Rgb = (123.675, 116.28, 103.53)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (58.395, 57.12, 57.375)

    @model_validator(mode="after")
    def _ways_agree(self) -> AugmentConfig:
        if self.jitter_scale and self.crop_px is None:
            raise ValueError("jitter_scale makes images of any size: set crop_px as well")
        if self.jitter_scale and self.crop_first:
            raise ValueError("jitter_scale and crop_first are two ways to vary the scale: set one of them")
        if self.jitter_scale and not 0 < self.jitter_scale[0] <= self.jitter_scale[1]:
            raise ValueError(f"jitter_scale={list(self.jitter_scale)} must be 0 < low <= high")
        if not self.short_edge_px:
            raise ValueError("short_edge_px is empty and must name at least one size")
        return self


class DataConfig(Strict):
    """Where samples come from and how they are batched.

    Attributes:
        train_shards: Folder of packed shards to train on.
        val_shards: Folder of packed shards to evaluate on.
        classes: Category names in label order; must equal the shards' own. Empty takes the shards' categories.
        num_streams: Canonical streams of an epoch's order; every world size that divides it sees the same batches.
        workers: Loader processes per rank; 0 loads in the training process.
        max_broken_share: The run stops when more than this share of the samples seen is broken.
    """

    train_shards: str
    val_shards: str
    classes: tuple[str, ...] = ()
    augment: AugmentConfig = AugmentConfig()
    micro_batch_size: Positive = 2
    num_streams: Positive = 48
    workers: NonNegative = 2
    max_broken_share: Rate = 0.01


class OptimizerConfig(Strict):
    """AdamW with layer-wise decay of the learning rate.

    Attributes:
        layer_decay: Factor on the rate for every layer further from the output.
        decay_all: Weight decay on norms and biases too, which it spares otherwise.
        clip_grad_norm: Bound on the norm of the whole gradient; 0 leaves it alone.
        lr_scaling: How the rate follows the images of a step: multiplied by their ratio to the reference
            (``linear``), by its root (``sqrt``), or not at all.
        reference_images_per_step: The images of a step that ``lr`` and ``schedule.warmup_steps`` are meant for, with
            ``linear`` and ``sqrt``; warm-up then takes as many images as there.
    """

    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    decay_all: bool = False
    clip_grad_norm: Annotated[float, Field(ge=0)] = 0.0
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    reference_images_per_step: Positive | None = None

    @model_validator(mode="after")
    def _scaling_has_a_reference(self) -> OptimizerConfig:
        if (self.lr_scaling == "none") != (self.reference_images_per_step is None):
            raise ValueError(
                f"lr_scaling={self.lr_scaling!r} and reference_images_per_step={self.reference_images_per_step} "
                "belong together: set lr_scaling to linear or sqrt and a reference, or neither"
            )
        return self


class ScheduleConfig(Strict):
    """The learning rate's factor as a function of the step.

    Attributes:
        milestones: Shares of the run (0-1) after which a ``step`` schedule multiplies by ``gamma``.
        warmup_ratio: Factor at step 0, rising linearly to 1.
    """

    kind: Literal["constant", "step", "cosine"] = "cosine"
    warmup_steps: NonNegative = 500
    warmup_ratio: Rate = 0.001
    milestones: tuple[Rate, ...] = (8 / 12, 11 / 12)
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    final_ratio: Rate = 0.0


class ZeroConfig(Strict):
    """DeepSpeed's sharding.

    Attributes:
        stage: 0 plain data parallel, 1 optimiser, 2 and gradients, 3 and parameters.
        persistence_threshold: Parameters of fewer elements stay whole on every rank; ``auto`` puts it between the
            largest branch's matrices and the next branch's.
        deepspeed: Raw DeepSpeed keys merged on top.
    """

    stage: Literal[0, 1, 2, 3] = 3
    persistence_threshold: Literal["auto"] | NonNegative = "auto"
    deepspeed: dict[str, Any] = {}


class TrainConfig(Strict):
    """How long, how precisely, and when to look up.

    Attributes:
        epochs: Passes over the training set; exactly one of ``epochs`` and ``steps`` is set.
        steps: Optimiser steps.
        precision: Of branches and interactions; neck, heads and losses are always fp32.
        images_per_step: Images of an optimiser step, the same on any number of ranks: accumulation follows from it.
            ``None`` takes what micro-batch, ranks and accumulation make.
        gradient_accumulation: Micro-batches that each rank adds up for a step.
        max_skipped_steps: The run stops when so many steps in a row had a loss or gradient that is not finite.
    """

    epochs: Positive | None = None
    steps: Positive | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    images_per_step: Positive | None = None
    gradient_accumulation: Positive = 1
    log_every_steps: Positive = 10
    evaluate_every_steps: NonNegative = 0
    checkpoint_every_steps: Positive = 500
    keep_checkpoints: Positive = 2
    max_skipped_steps: Positive = 10

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"exactly one of epochs={self.epochs} and steps={self.steps} must be set")
        return self

    @model_validator(mode="after")
    def _one_batch_rule(self) -> TrainConfig:
        if self.images_per_step is not None and self.gradient_accumulation != 1:
            raise ValueError(
                f"images_per_step={self.images_per_step} decides gradient_accumulation={self.gradient_accumulation}: "
                "leave one of them out"
            )
        return self


class RunConfig(Strict):
    """Everything one training is: what a config file describes and what a run directory keeps."""

    task: Literal["detection"] = "detection"
    model: PiipConfig
    detector: DetectorConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    zero: ZeroConfig = ZeroConfig()
    train: TrainConfig
