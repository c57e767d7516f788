"""Config of a run, whatever its task: data, optimisation, sharding, and when to save, look and evaluate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from piip_scale.config.base import NonNegative, Positive, Strict
from piip_scale.config.model import PiipConfig
from piip_scale.config.sampling import SamplingConfig
from piip_scale.config.telemetry import TelemetryConfig
from piip_scale.config.zero import ZeroConfig

Rate = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Rgb = tuple[float, float, float]
PositiveFloat = Annotated[float, Field(gt=0)]


def check_padding(model: PiipConfig, pad_multiple_px: int) -> None:
    """Holds the sides of a batch to the network's levels.

    Raises:
        ValueError: A level would end in a part of a cell.
    """
    stride_px = model.geometry.coarsest_stride_px()
    if pad_multiple_px % stride_px:
        raise ValueError(
            f"data.augment.pad_multiple_px={pad_multiple_px} must be a multiple of {stride_px}, the stride of the "
            "pyramid's smallest level: others end in parts of cells"
        )


class CacheConfig(Strict):
    """How the shards of a remote set reach a node; sets in folders are read in place.

    Attributes:
        folder: On a disk of the node itself; its ranks, their loader processes and other runs share what is there.
            ``auto`` takes a folder of the user's in $TMPDIR, or /tmp.
        limit_gib: It never holds more; what was not used for longest goes first.
        prefetch_shards: Each rank fetches so many shards ahead of those its loader has come to; 0 fetches on need.
        retries: Further tries, with growing pauses, of a download that failed, before the run stops.
        stall_seconds: A download that brings nothing for so long has failed.
        max_unsized_mib: Most of a file whose length nothing states, as manifests and indexes; a source may never end.
    """

    folder: str = "auto"
    limit_gib: PositiveFloat = 100.0
    prefetch_shards: NonNegative = 8
    retries: NonNegative = 6
    stall_seconds: PositiveFloat = 60.0
    max_unsized_mib: PositiveFloat = 256.0


class DataConfig(Strict):
    """Where samples come from and how they are batched.

    Attributes:
        train_shards: Packed shards to train on: a folder, ``http(s)://``, ``s3://`` or ``gs://``, or ``pipe:`` and a
            shell command that writes the file ``{name}`` of the set to its standard output.
        val_shards: Packed shards to evaluate on, likewise.
        classes: Category names in label order; must equal the shards' own. Empty takes the shards' categories.
        num_classes: What the shards must have; ``plan`` and ``count`` take it where neither names nor shards are there.
        sampling: Rare images come more often; without, each comes once in an epoch.
        num_streams: Canonical streams of an epoch's order. ``auto`` takes the least common multiple of 48 and the
            ranks that the run begins on, and a run that resumes keeps what it began with. Where the ranks divide it,
            each reads whole streams, and so few shards; the images of a step are the same on any ranks.
        workers: Loader processes per rank; 0 loads in the training process.
        max_broken_share: The run stops when more than this share of a set's samples is found broken.
        max_pixels: A set with an image of more pixels is refused: small files can be made to fill any memory.
        cache: Where shards that are not in a folder are kept on the node.
    """

    train_shards: str
    val_shards: str
    classes: tuple[str, ...] = ()
    num_classes: Positive | None = None
    sampling: SamplingConfig | None = None
    micro_batch_size: Positive = 2
    num_streams: Literal["auto"] | Positive = "auto"
    workers: NonNegative = 2
    max_broken_share: Rate = 0.01
    max_pixels: Positive = 500_000_000
    cache: CacheConfig = CacheConfig()

    @model_validator(mode="after")
    def _numbers_agree(self) -> DataConfig:
        if self.classes and self.num_classes not in (None, len(self.classes)):
            raise ValueError(f"num_classes={self.num_classes} is not the number of classes named: leave it out")
        return self


class OptimizerConfig(Strict):
    """AdamW with layer-wise decay of the learning rate.

    Attributes:
        layer_decay: Factor on the rate for every layer further from the output.
        fresh_lr_ratio: Factor on the rate of what lies outside the branches (interactions, merging, heads), or is
            added to one (``lora``), and starts from random weights where branches are pretrained.
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
    fresh_lr_ratio: PositiveFloat = 1.0
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
        kind: How it falls after warm-up: not at all, in steps, along half a cosine, or as a power of what is left of
            the run (``poly``).
        milestones: Shares of the run (0-1) after which a ``step`` schedule multiplies by ``gamma``.
        warmup_ratio: Factor at step 0, rising linearly to 1.
    """

    kind: Literal["constant", "step", "cosine", "poly"] = "cosine"
    warmup_steps: NonNegative = 500
    warmup_ratio: Rate = 0.001
    milestones: tuple[Rate, ...] = (8 / 12, 11 / 12)
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    final_ratio: Rate = 0.0
    power: PositiveFloat = 1.0


class TrainConfig(Strict):
    """How long, how precisely, and when to look up.

    Attributes:
        epochs: Passes over the training set; exactly one of ``epochs`` and ``steps`` is set.
        steps: Optimiser steps.
        precision: Of branches and interactions; neck, heads and losses are always fp32.
        fp32_precision: Of matrix products and convolutions in float32 on a GPU, those of neck and heads among them:
            ``ieee``, or ``tf32``, which rounds factors to 10 bits of mantissa for speed. ``auto`` takes ``tf32`` beside
            ``precision='bf16'`` and ``ieee`` otherwise.
        images_per_step: Images of an optimiser step, the same on any number of ranks: accumulation follows from it.
            ``None`` takes what micro-batch, ranks and accumulation make.
        gradient_accumulation: Micro-batches that each rank adds up for a step.
        keep_checkpoints: So many of the newest stay.
        milestone_every_steps: Checkpoints of steps that it divides stay whatever their age; 0 for none.
        background_saves: Write checkpoints while training goes on, from a copy in host memory that is as large as
            this rank's files; without, training waits for the disk.
        save_frozen: Checkpoints hold frozen weights too. Without, what starts from files of pretrained weights stays
            out, and a checkpoint holds these files' checksums: resuming and converting need the files.
        ema_decay: Keep a running average of the weights, of which this share stays at every step; evaluation during
            training and ``convert --ema`` use it. 4 bytes a trained parameter, sharded like the optimiser's state.
        ema_warmup: The average follows faster at first: the decay of update n is at most 1 - (1 + n)^(-2/3).
        max_skipped_steps: The run stops when so many steps in a row were not applied: their loss or gradient was not
            finite, or their loss above ``max_loss_ratio``.
        max_loss_ratio: A step is not applied where a rank's own loss is more than so many times its median over that
            rank's last ``loss_trend_steps`` applied steps. ``None`` judges no finite loss: a rank has few images, whose
            loss varies by several times where nothing is wrong, and what is skipped is never learned. 10 or more is
            meant against accidents. A process judges once it has applied ``loss_trend_steps``, after a resume anew.
        loss_trend_steps: See ``max_loss_ratio``.
        deterministic: Only kernels that give the same bits from run to run, slower; one that has no such form ends the
            run with its name. On CPUs all do without it: there the same config, ranks and threads give the same bits,
            resumed or not. On a GPU sums of atomics (the backward passes of deformable attention, RoIAlign and
            sampling) differ in last digits, so that two runs, or a run and its continuation, part slowly; on other
            numbers of ranks sums round otherwise everywhere.
        compile: ``blocks`` has torch.compile make one program of every kind of block, ``off`` computes them operator by
            operator, and ``auto`` compiles on a GPU where Triton and a C compiler are there, but not with
            ``deterministic``. Programs are built in the first steps and differ from plain operators in last digits.
        hang_minutes: The run ends, with the stacks of all ranks, when one waits for its data or computes for longer
            than that in a step.
        slow_hang_minutes: The same for what may take longer: the start, the first step with its compiling, a
            checkpoint, a batch of an evaluation and its metric.
    """

    epochs: Positive | None = None
    steps: Positive | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    fp32_precision: Literal["auto", "ieee", "tf32"] = "auto"
    images_per_step: Positive | None = None
    gradient_accumulation: Positive = 1
    log_every_steps: Positive = 10
    evaluate_every_steps: NonNegative = 0
    checkpoint_every_steps: Positive = 500
    keep_checkpoints: Positive = 2
    milestone_every_steps: NonNegative = 0
    background_saves: bool = True
    save_frozen: bool = True
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    ema_warmup: bool = False
    max_skipped_steps: Positive = 10
    max_loss_ratio: Annotated[float, Field(gt=1)] | None = None
    loss_trend_steps: Positive = 100
    deterministic: bool = False
    compile: Literal["auto", "blocks", "off"] = "auto"
    hang_minutes: PositiveFloat = 10.0
    slow_hang_minutes: PositiveFloat = 60.0

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"exactly one of epochs={self.epochs} and steps={self.steps} must be set")
        return self

    @model_validator(mode="after")
    def _programs_are_deterministic(self) -> TrainConfig:
        if self.deterministic and self.compile == "blocks":
            raise ValueError(
                "compile='blocks' does not go with deterministic=True: which program computes an image depends on the "
                "sizes that came before it, and a run that is resumed has seen others; set compile to off or auto"
            )
        return self

    @model_validator(mode="after")
    def _slow_is_slower(self) -> TrainConfig:
        if self.slow_hang_minutes < self.hang_minutes:
            raise ValueError(
                f"slow_hang_minutes={self.slow_hang_minutes} must be at least hang_minutes={self.hang_minutes}"
            )
        return self

    @model_validator(mode="after")
    def _one_batch_rule(self) -> TrainConfig:
        if self.images_per_step is not None and self.gradient_accumulation != 1:
            raise ValueError(
                f"images_per_step={self.images_per_step} decides gradient_accumulation={self.gradient_accumulation}: "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _warm_up_of_something(self) -> TrainConfig:
        if self.ema_warmup and self.ema_decay is None:
            raise ValueError("ema_warmup needs ema_decay: set it, 0.9998 for example")
        return self

    @model_validator(mode="after")
    def _milestones_are_saved(self) -> TrainConfig:
        if self.milestone_every_steps % self.checkpoint_every_steps:
            raise ValueError(
                f"milestone_every_steps={self.milestone_every_steps} must be a multiple of "
                f"checkpoint_every_steps={self.checkpoint_every_steps}"
            )
        return self


class RunConfig(Strict):
    """The settings of every training, whatever its task: a config file describes it, a run directory keeps it.

    Attributes:
        task: What is trained; each has a config of its own, which adds the heads and how images are augmented.
    """

    task: str
    model: PiipConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    zero: ZeroConfig = ZeroConfig()
    train: TrainConfig
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _kernels_are_deterministic(self) -> RunConfig:
        if self.train.deterministic and self.model.deform_kernel == "triton":
            raise ValueError(
                "train.deterministic=True does not go with model.deform_kernel='triton', whose backward pass adds "
                "gradients with atomics: set it to auto or reference"
            )
        return self

    @model_validator(mode="after")
    def _gradients_are_not_rounded_alone(self) -> RunConfig:
        if self.zero.reduce_dtype != "fp32" and self.train.precision == "fp32":
            raise ValueError(
                f"zero.reduce_dtype={self.zero.reduce_dtype!r} would round gradients that train.precision='fp32' keeps "
                "exact: set train.precision='bf16', or leave zero.reduce_dtype out"
            )
        return self

    @model_validator(mode="after")
    def _frozen_is_elsewhere(self) -> RunConfig:
        files = (self.model.pretrained, *(branch.pretrained for branch in self.model.branches))
        if not self.train.save_frozen and not any(files):
            raise ValueError(
                "train.save_frozen=False leaves out what pretrained weights bring, and no file of them is named: set "
                "model.branches.N.pretrained or model.pretrained, or leave save_frozen out"
            )
        return self

    @model_validator(mode="after")
    def _stored_stays_on_the_device(self) -> RunConfig:
        stored = [i for i, b in enumerate(self.model.branches) if getattr(b, "frozen_dtype", "run") != "run"]
        if stored and self.zero.offload_parameters != "none":
            raise ValueError(
                f"model.branches.{stored[0]}.frozen_dtype does not go with zero.offload_parameters="
                f"{self.zero.offload_parameters!r}, whose buffers have one precision: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _averages_can_be_kept(self) -> RunConfig:
        if self.train.ema_decay is not None and self.zero.optimizer_is_on_disk:
            raise ValueError(
                f"train.ema_decay={self.train.ema_decay} averages weights in memory: it does not go with "
                f"zero.offload_optimizer={self.zero.offload_optimizer!r}"
            )
        return self
