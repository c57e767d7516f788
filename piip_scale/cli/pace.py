"""A run's steps and what they cost, as ``piip-scale plan`` prints them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from piip_scale.config import RunConfig
    from piip_scale.data.reading.opened import OpenedSets
    from piip_scale.engine.planning.memory import MemoryPlan

_TERA, _GIGA = 1e12, 1e9
_HOUR_S = 3600


@dataclass(frozen=True)
class Pace:
    """A run's steps and their cost.

    Attributes:
        images_per_step: On all GPUs.
        steps_per_epoch: ``None`` where the training shards are not there.
        flops_per_image: Model FLOPs of the network in a training step, as training logs them and its MFU: as far as
            it is trained, without neck and heads and what checkpointing computes again.
        head_flops_per_image: Those of neck and heads, in float32.
        recomputed_flops_per_image: What checkpointed blocks compute a second time.
        seconds_per_step: At the speed asked for.
        steps: Of the whole schedule; ``None`` where that is in epochs of a set that is not there.
    """

    images_per_step: int
    steps_per_epoch: int | None
    flops_per_image: int
    head_flops_per_image: int
    recomputed_flops_per_image: int
    seconds_per_step: float | None
    steps: int | None = None

    @classmethod
    def of(
        cls,
        run: RunConfig,
        plan: MemoryPlan,
        size_px: tuple[int, int] | None,
        flops: float | None,
        sets: OpenedSets,
        epoch_images: int | None = None,
    ) -> Pace:
        """The pace of a run whose every GPU does so many FLOP/s; images of ``size_px``, or as large as training's."""
        from piip_scale.tasks.counting import head_flops, likely_classes, network_flops, recomputed_flops
        from piip_scale.tasks.outline import training_size_px

        classes, size = likely_classes(run, sets)[1], size_px or training_size_px(run)
        network, heads = network_flops(run, classes, *size), head_flops(run, classes, *size)
        seconds = None if flops is None else network * plan.images_per_step / (plan.num_ranks * flops)
        again, of_epoch = recomputed_flops(run, classes, *size), _steps_per_epoch(run, plan, sets, epoch_images)
        steps = run.train.steps or (of_epoch and of_epoch * (run.train.epochs or 1))
        return cls(plan.images_per_step, of_epoch, network, heads, again, seconds, steps)

    @property
    def recomputed_share(self) -> float:
        """Of the arithmetic of the network's step, without neck and heads."""
        again = self.recomputed_flops_per_image
        return again / (self.flops_per_image + again)

    def lines(self) -> list[str]:
        """For the user."""
        steps = "" if self.steps_per_epoch is None else f"; {self.steps_per_epoch:,} steps an epoch"
        flops = f"{_flop_text(self.flops_per_image)} an image"
        heads = f"{_flop_text(self.head_flops_per_image)} more in neck and heads, which MFU leaves out"
        lines = [f"{flops}, {heads}{steps}"]
        if (seconds := self.seconds_per_step) is not None:
            hours = None if self.steps_per_epoch is None else self.steps_per_epoch * seconds / _HOUR_S
            epoch = "" if hours is None else f", {hours:.2f} h an epoch"
            lines.append(f"at that speed {seconds:.2f} s a step, {self.images_per_step / seconds:.1f} images/s{epoch}")
        return lines


def _flop_text(flops: float) -> str:
    return f"{flops / _TERA:.2f} TFLOP" if flops >= _TERA / 10 else f"{flops / _GIGA:.1f} GFLOP"


def _steps_per_epoch(run: RunConfig, plan: MemoryPlan, sets: OpenedSets, epoch_images: int | None) -> int | None:
    from piip_scale.data.stream import epoch_size

    if epoch_images is not None:
        return epoch_images // plan.images_per_step
    shards = sets.find(run.data.train_shards, run.data, run.data.classes)
    return None if shards is None else epoch_size(shards, run.data) // plan.images_per_step
