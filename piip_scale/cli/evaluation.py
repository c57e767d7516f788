"""Evaluating a trained model, in one process or as one of several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from piip_scale.cli.evaluation_set import SetOptions
from piip_scale.data.batch import Batch
from piip_scale.errors import DataError
from piip_scale.tasks.views import Views
from piip_scale.text import printable
from piip_scale.world import World

PREDICTIONS = "predictions.json"
PAGE = "evaluation.html"
PICTURES = "pictures"

if TYPE_CHECKING:
    from piip_scale.data.reading.sample_set import SampleSet
    from piip_scale.engine.replicas import Track
    from piip_scale.tasks.base import Metric, Task
    from piip_scale.tasks.detection.scoring import Scoring
    from piip_scale.tasks.report import Report
    from piip_scale.tasks.trained import Trained


@dataclass(frozen=True)
class Asked:
    """What to evaluate.

    Attributes:
        source: A config file, or a run's directory.
        weights: See ``find_trained``, as ``step`` and ``averaged``.
        overrides: Changes to the config.
        set_options: The set, where it is not the config's own shards.
        precision: Of the network, ``fp32`` or ``bf16``.
        scoring: Of detections; ``None`` for COCO's, or another task's own.
        views: What each image is looked at as.
        devices: That the model is spread over, as ``named_devices`` takes them; ``None`` for a whole one a rank.
    """

    source: Path
    weights: Path | None = None
    step: int | None = None
    averaged: bool = False
    overrides: tuple[str, ...] = ()
    set_options: SetOptions = field(default_factory=SetOptions)
    precision: str = "fp32"
    scoring: Scoring | None = None
    views: Views = field(default_factory=Views)
    devices: str | None = None

    def find(self) -> tuple[Trained, SampleSet]:
        """Config and weights, and the set, whose classes the config takes where it names none. Not collective.

        Raises:
            PiipError: One is absent, damaged, or not the other's.
        """
        from piip_scale.tasks.trained import find_trained

        found = find_trained(
            self.source, self.weights, overrides=self.overrides, step=self.step, averaged=self.averaged
        )
        samples = self.set_options.open(found.config)
        return found.with_classes(samples.classes), samples


@dataclass(frozen=True)
class Outputs:
    """What is written of an evaluation, where it is asked for.

    Attributes:
        predictions: A file of what was found in every image, detections in COCO's result format.
        folder: Gets that as ``predictions.json``, the metrics, what ``Report.write`` writes, ``evaluation.html`` and
            ``pictures/``.
    """

    predictions: Path | None = None
    folder: Path | None = None


NO_OUTPUTS = Outputs()


def evaluate_model(asked: Asked, outputs: Outputs = NO_OUTPUTS, world: World | None = None) -> dict[str, float]:
    """The task's metrics of a trained model over a set. Collective; the same on every rank.

    Args:
        asked: Model and set.
        outputs: What to write.
        world: The ranks; ``None`` for one alone.

    Raises:
        PiipError: Set or weights are absent, damaged, or do not fit the config; on every rank, and on all but one
            marked as an echo.
    """
    from piip_scale.engine.replicas import count_broken, joined, together

    world = world or World()
    with joined(world), _track(world) as track:
        samples, task, metric, limit = together(lambda: _predicted(asked, world, track))
        num_broken = count_broken(task, limit)
        if num_broken and world.is_main:
            typer.echo(f"{num_broken} image(s) could not be used; what is in them counts as not found", err=True)
        for path in (outputs.predictions, outputs.folder and outputs.folder / PREDICTIONS):
            if path is not None:
                metric.write_results(path)
        metrics = metric.compute()
        if outputs.folder is not None:
            report = metric.report()
            if report is not None:
                source = f"{asked.source}, on {samples.location}"
                _write_report(_Scored(metrics, report, source, samples), outputs.folder)
        return metrics


@dataclass(frozen=True)
class _Scored:
    """What is written of an evaluation, on rank 0; ``samples`` where its images can be drawn."""

    metrics: dict[str, float]
    report: Report
    source: str
    samples: SampleSet | None = None


def score_file(results: Path, options: SetOptions, shards: str, outputs: Outputs, scoring: Scoring) -> dict[str, float]:
    """The metrics of a COCO results file, without any model.

    Args:
        results: The file.
        options: The set: a COCO file, whose images are not looked at, or none for shards.
        shards: Packed shards.
        outputs: What to write.
        scoring: How.

    Raises:
        DataError: Results and set do not belong together, or cannot be read.
    """
    from piip_scale.data.packing.coco import load_coco_json
    from piip_scale.data.reading.shards import ShardSet
    from piip_scale.tasks.detection.foreign_results import federated, read_results
    from piip_scale.tasks.detection.metric import CocoMetric

    samples = None
    if options.coco is not None:
        root = load_coco_json(options.coco)
        truth = root | {"categories": sorted(root["categories"], key=lambda category: category["id"])}
        if scoring.style == "lvis":
            truth = federated(truth, root, str(options.coco))
    elif not shards:
        raise DataError("--results come without a set", fix="name its annotations with --coco, or --shards")
    else:
        samples = ShardSet.open(shards, kind="detection")
        truth = samples.coco_ground_truth()
    entries = read_results(results, truth)
    with_masks = bool(entries) and all("segmentation" in entry for entry in [*entries, *truth["annotations"]])
    metric = CocoMetric(truth, with_masks, scoring)
    if with_masks and not all("bbox" in entry for entry in entries):
        metric.parts = ("mask",)
    if with_masks:
        entries = [metric.checked_result(entry) for entry in entries]
    metrics = metric.score_results(entries)
    if outputs.folder is not None:
        scored = _Scored(metrics, metric.report_results(entries), str(results), samples)
        _write_report(scored, outputs.folder)
    return metrics


def _write_report(scored: _Scored, folder: Path) -> None:
    from piip_scale.data.reading.files import write_bytes
    from piip_scale.tasks.cases import drawn_cases, write_pictures
    from piip_scale.tasks.evaluation_page import Evaluated, evaluation_page

    best, worst = drawn_cases(scored.report, scored.samples) if scored.samples else ([], [])
    evaluated = Evaluated(scored.metrics, scored.report, scored.source, best, worst)
    write_bytes(folder / PAGE, evaluation_page(evaluated))
    write_pictures(folder / PICTURES, best, worst)
    for path in [folder / PAGE, *scored.report.write(folder)]:
        typer.echo(printable(f"written: {path}"), err=True)


def _predicted(asked: Asked, world: World, track: Track) -> tuple[SampleSet, Task, Metric, float]:
    """The set, its task and metric with this rank's predictions, and how many images may be broken."""
    from piip_scale.engine.fp32_precision import apply_fp32_precision
    from piip_scale.engine.replicas import predicted
    from piip_scale.engine.zero.setup import choose_device
    from piip_scale.tasks.kinds import build_task, view_predictor
    from piip_scale.tasks.spreading import named_devices

    own, spread_over = choose_device(world), () if asked.devices is None else named_devices(asked.devices)
    found, samples = asked.find()
    apply_fp32_precision(found.config.train)
    tasks = [build_task(config, world, val_set=samples) for config in asked.views.configs(found.config)]
    task = tasks[0]
    model = found.load(asked.precision, own, spread_over=spread_over)
    predict = view_predictor(found.config, model, asked.views)
    limit = found.config.data.max_broken_share * task.num_val_samples()
    metric = predicted(tasks, predict, next(model.parameters()).device, track)
    if asked.scoring is not None:
        _score_by(metric, asked.scoring, asked.set_options.coco)
    return samples, task, metric, limit


def _score_by(metric: Metric, scoring: Scoring, coco: Path | None) -> None:
    from piip_scale.data.packing.coco import load_coco_json
    from piip_scale.tasks.detection.foreign_results import federated
    from piip_scale.tasks.detection.metric import CocoMetric

    if not isinstance(metric, CocoMetric):
        raise DataError("--metric and --max-dets", rule="they score objects, and this run finds none")
    if scoring.style == "lvis":
        if coco is None:
            raise DataError(
                "--metric lvis", rule="it needs what LVIS's file says of images", fix="name that file with --coco"
            )
        metric.truth = federated(metric.truth, load_coco_json(coco), str(coco))
    metric.scoring = scoring


@contextmanager
def _track(world: World) -> Iterator[Track]:
    """A progress bar on rank 0, nothing where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    shown = partial(track, console=console, transient=True, disable=not (world.is_main and console.is_terminal))

    def tracked(batches: Iterable[tuple[Batch, ...]], total: int) -> Iterable[tuple[Batch, ...]]:
        return shown(batches, "evaluating", total)

    yield tracked
