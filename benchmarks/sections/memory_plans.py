"""What plans say a rank holds in a step against the most that its tensors do hold, on CPUs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch

from piip_scale.config.detection import DetectionRun
from piip_scale.engine.batching import scale_to_ranks
from piip_scale.engine.ema import WeightAverage
from piip_scale.engine.planning.cluster import GLOO
from piip_scale.engine.planning.memory import MemoryPlan
from piip_scale.engine.planning.planner import Planner
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.deepspeed_api import Engine
from piip_scale.engine.zero.setup import build_engine
from piip_scale.tasks.outline import outline_run
from piip_scale.world import World
from sections.peaks import Ledger, Peaks, alive_bytes, tensors
from sections.processes import run_ranks
from sections.record import table
from sections.subject import NUM_CLASSES, build, detector_config, made_up_batch

CLOSE = 0.1
_MIB = 2**20
# As many as saturate what samplers draw, as the proposals of a trained detector do.
_OBJECTS = 16
_NETWORK = {"large_dim": 256, "depth": 4}
_OVERRIDES = {
    "mask_rcnn": {"train_cfg.rcnn.sampler.num": 64, "train_cfg.rpn_proposal.max_per_img": 200},
    "dino": {},
}
_KERNELS = {"attention_kernel": "sdpa", "deform_kernel": "reference", "fused_kernel": "plain"}


@dataclass(frozen=True, eq=False)
class Case:
    """A run, small enough for a CPU.

    Attributes:
        name: What is particular about it.
        ranks: On which it runs.
        zero: Section of the config.
        precision: ``fp32`` or ``bf16``.
        accumulation: Micro-batches of a step.
        images: Of a micro-batch.
        size_px: Side of its images.
        averaged: Whether weights are averaged.
        network: Arguments of ``detector_config`` for the network, and keys of its section ``model``.
        kind: The detector.
    """

    name: str
    ranks: int = 1
    zero: dict[str, Any] = field(default_factory=dict)
    precision: str = "bf16"
    accumulation: int = 1
    images: int = 1
    size_px: int = 128
    averaged: bool = False
    network: dict[str, Any] = field(default_factory=dict)
    kind: str = "mask_rcnn"

    @property
    def config(self) -> DetectionRun:
        """The run on these ranks."""
        train = {
            "steps": 2,
            "precision": self.precision,
            "gradient_accumulation": self.accumulation,
            "background_saves": False,
            "ema_decay": 0.99 if self.averaged else None,
        }
        sections: dict[str, Any] = {"zero": self.zero, "train": train, "data": {"micro_batch_size": self.images}}
        config = detector_config(self.kind, overrides=_OVERRIDES[self.kind], **sections, **(_NETWORK | self.network))
        model = config.model.model_copy(update=_KERNELS)
        return cast(DetectionRun, scale_to_ranks(config.model_copy(update={"model": model}), self.ranks))


def measured(world: World, _device: torch.device, cases: Sequence[Case]) -> list[Peaks]:
    """Of each case's second step, on this rank. Collective."""
    found = []
    for case in cases:
        found.append(_peaks(case, world))
        # DeepSpeed's engines leave some of themselves behind: nothing of it may be freed while the next one runs.
        gc.collect()
    return found


def _peaks(case: Case, world: World) -> Peaks:
    config = case.config
    others = [weakref.ref(tensor) for tensor in tensors()]
    engine, _ = build_engine(build(config), config, world)
    average = WeightAverage(engine, config.train.ema_decay) if config.train.ema_decay else None
    for step in range(2):
        batches = [
            made_up_batch(world.rank * case.accumulation + micro, case.images, case.size_px, _OBJECTS)
            for micro in range(case.accumulation)
        ]
        gc.collect()
        ledger = Ledger(alive_bytes(others))
        with ledger.open(), _told_of_updates(engine, ledger):
            train_step(engine, batches, step, 0, world)
            if average:
                average.update()
    engine.destroy()
    return ledger.peaks()


@contextmanager
def _told_of_updates(engine: Engine, ledger: Ledger) -> Iterator[None]:
    update = engine.step

    def told() -> None:
        if engine.is_gradient_accumulation_boundary():
            ledger.begin_update()
        update()

    engine.step = told
    yield
    engine.step = update


def planned_bytes(case: Case) -> float:
    """The same run's, by its plan; what is offloaded stays in a CPU's memory."""
    plan = planned(case)
    return plan.total - plan.reserve + plan.host_memory


def planned(case: Case) -> MemoryPlan:
    """The same run's plan."""
    size_px = (case.size_px, case.size_px)
    outline_of = partial(outline_run, num_classes=NUM_CLASSES, size_px=size_px, device_type="cpu")
    return Planner(outline_of, float("inf"), case.ranks, GLOO).plan(case.config, case.ranks)


_STAGE_3, _OFFLOADED = {"stage": 3}, {"stage": 3, "offload_optimizer": "cpu"}
# Buckets as small beside the network as those of a large one are.
_SMALL_BUCKETS = {"stage": 3, "deepspeed": {"zero_optimization": {"reduce_bucket_size": 400_000}}}
_CHECKPOINTED = {"checkpoint_blocks": True}
CASES = (
    Case("stage 0", 1, {"stage": 0}, "fp32"),
    Case("stage 1", 1, {"stage": 1}),
    Case("stage 2", 1, {"stage": 2}),
    Case("stage 3", 1, _STAGE_3, "fp32"),
    Case("stage 3", 1, _STAGE_3),
    Case("stage 3, averaged weights", 1, _STAGE_3, averaged=True),
    Case("stage 3, 4 micro-batches", 1, _STAGE_3, accumulation=4),
    Case("stage 3, 4 images", 1, _STAGE_3, images=4),
    Case("stage 3, 4 images, blocks again", 1, _STAGE_3, images=4, network=_CHECKPOINTED),
    Case("stage 3, 2 images of 256 px", 1, _STAGE_3, images=2, size_px=256),
    Case("stage 3, 4 images of 256 px, dim 128", 1, _STAGE_3, images=4, size_px=256, network={"large_dim": 128}),
    Case("stage 3, optimiser offloaded", 1, _OFFLOADED),
    Case("stage 3, DINO, 2 images", 1, _STAGE_3, images=2, kind="dino"),
    Case("stage 3, DINO, 2 images of 256 px", 1, _STAGE_3, images=2, size_px=256, kind="dino"),
    Case("stage 3, DINO", 2, _STAGE_3, kind="dino"),
    Case("stage 0, 2 images", 2, {"stage": 0}, "fp32", images=2),
    Case("stage 1", 2, {"stage": 1}, "fp32"),
    Case("stage 1", 2, {"stage": 1}),
    Case("stage 2", 2, {"stage": 2}, "fp32"),
    Case("stage 2", 2, {"stage": 2}),
    Case("stage 2, 2 micro-batches", 2, {"stage": 2}, accumulation=2),
    Case("stage 3", 2, _STAGE_3, "fp32"),
    Case("stage 3", 2, _STAGE_3),
    Case("stage 3, 4 images", 2, _STAGE_3, images=4),
    Case("stage 3, 4 images, small buckets", 2, _SMALL_BUCKETS, images=4),
    Case("stage 3, optimiser offloaded", 2, _OFFLOADED),
    Case("stage 3", 4, _STAGE_3),
    Case("stage 3, shard_over=2", 4, _STAGE_3 | {"shard_over": 2}),
    Case("stage 3, shard_over=2, averaged, 2 micro-batches", 4, _STAGE_3 | {"shard_over": 2}, "bf16", 2, averaged=True),
    Case("stage 3, node_partition=2", 4, _STAGE_3 | {"node_partition": 2}),
    Case("stage 3, node_partition=2", 4, _STAGE_3 | {"node_partition": 2}, "fp32"),
)
_TEXT = (
    "The most bytes of tensors alive in a step, by torch's own record of every allocation of rank 0, and what `plan` "
    "says of the same config and ranks, its 1.5 GiB for libraries left out; over gloo, with torch's kernels. Mask "
    "R-CNN with branches of 256 and 64 dimensions and 4 blocks on one image of 128 px, where nothing else is said; 16 "
    "objects an image, which fill the RoI heads' share of positive samples as the proposals of a trained detector do: "
    "with few objects and fresh weights heads keep less than planned. What is offloaded lies in the same memory here "
    "and counts on both sides. On CPUs only, and so planned for gloo only: a reduce-scatter sums a copy of its message."
)


def section() -> str:
    """The table, and a line on it."""
    rows, errors = [], {}
    for case, found in measure_all(CASES):
        plan = planned_bytes(case)
        errors[case] = plan / found.most - 1
        sizes = (f"{size / _MIB:.1f}" for size in (found.before, found.passes, found.update, plan))
        rows.append([case.name, case.ranks, case.precision, *sizes, f"{errors[case]:+.0%}"])
    close = sum(abs(error) <= CLOSE for error in errors.values())
    worst, error = max(errors.items(), key=lambda item: abs(item[1]))
    head = ["", "ranks", "", "between steps, MiB", "most in passes", "in the update", "planned", ""]
    return (
        f"{_TEXT}\n\n{close} of {len(errors)} are planned within {CLOSE:.0%}; the worst is {error:+.0%} ({worst.name}, "
        f"{worst.precision} on {worst.ranks}).\n\n{table(head, rows)}"
    )


def measure_all(cases: Sequence[Case]) -> Iterator[tuple[Case, Peaks]]:
    """Each case with what rank 0 held, those of as many ranks in the same processes."""
    for ranks in sorted({case.ranks for case in cases}):
        own = [case for case in cases if case.ranks == ranks]
        yield from zip(own, run_ranks(ranks, measured, own)[0], strict=True)
