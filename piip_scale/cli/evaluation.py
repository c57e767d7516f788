"""Evaluating a trained model, in one process or as one of several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from piip_scale.cli.evaluation_set import SetOptions
from piip_scale.data.batch import Batch
from piip_scale.world import World

if TYPE_CHECKING:
    from piip_scale.engine.replicas import Track
    from piip_scale.tasks.base import Metric, Task, TrainableModel


@dataclass(frozen=True)
class Asked:
    """What to evaluate.

    Attributes:
        source: A config file, or a run's directory.
        weights: See ``find_trained``, as ``step`` and ``averaged``.
        overrides: Changes to the config.
        set_options: The set, where it is not the config's own shards.
        precision: Of the network, ``fp32`` or ``bf16``.
    """

    source: Path
    weights: Path | None = None
    step: int | None = None
    averaged: bool = False
    overrides: tuple[str, ...] = ()
    set_options: SetOptions = field(default_factory=SetOptions)
    precision: str = "fp32"


def evaluate_model(asked: Asked, predictions_out: Path | None = None, world: World | None = None) -> dict[str, float]:
    """The task's metrics of a trained model over a set. Collective; the same on every rank.

    Args:
        asked: Model and set.
        predictions_out: Where to write what was found in every image, detections in COCO's result format; ``None`` to
            keep it.
        world: The ranks; ``None`` for one alone.

    Raises:
        PiipError: Set or weights are absent, damaged, or do not fit the config; on every rank, and on all but one
            marked as an echo.
    """
    from piip_scale.engine.replicas import count_broken, joined, together

    world = world or World()
    with joined(world), _track(world) as track:
        task, metric, limit = together(lambda: _predicted(asked, world, track))
        num_broken = count_broken(task, limit)
        if num_broken and world.is_main:
            typer.echo(f"{num_broken} image(s) could not be used; what is in them counts as not found", err=True)
        if predictions_out is not None:
            metric.write_results(predictions_out)
        return metric.compute()


def _predicted(asked: Asked, world: World, track: Track) -> tuple[Task, Metric, float]:
    """Task and metric with this rank's predictions, and how many images may be broken."""
    from piip_scale.engine.fp32_precision import apply_fp32_precision
    from piip_scale.engine.replicas import predicted
    from piip_scale.engine.zero.setup import choose_device
    from piip_scale.tasks.kinds import build_task
    from piip_scale.tasks.trained import find_trained

    device = choose_device(world)
    found = find_trained(
        asked.source, asked.weights, overrides=asked.overrides, step=asked.step, averaged=asked.averaged
    )
    val_set = asked.set_options.open(found.config)
    if val_set is not None:
        found = found.with_classes(val_set.classes)
    apply_fp32_precision(found.config.train)
    task = build_task(found.config, world, val_set=val_set)
    model = cast("TrainableModel", found.load(asked.precision, device))
    limit = found.config.data.max_broken_share * task.num_val_samples()
    return task, predicted(task, model, device, track), limit


@contextmanager
def _track(world: World) -> Iterator[Track]:
    """A progress bar on rank 0, nothing where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    shown = partial(track, console=console, transient=True, disable=not (world.is_main and console.is_terminal))

    def tracked(batches: Iterable[Batch], total: int) -> Iterable[Batch]:
        return shown(batches, "evaluating", total)

    yield tracked
