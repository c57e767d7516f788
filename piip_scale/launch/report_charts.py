"""Which of a run's curves a report shows, and how it calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from piip_scale.launch.run_curves import RunCurves
from piip_scale.pages.charts import NUM_COLOURS, Curve, Mark, line_chart
from piip_scale.pages.html import Html, tag

EVALUATION = "eval/"
_FIRST = {"loss/total": "Loss, total"}
_LATER = {
    "throughput/images_per_second": "Images/s, all GPUs",
    "throughput/mfu": "MFU",
    "throughput/model_tflops_per_rank": "Model TFLOP/s per GPU",
    "time/step_ms": "Step, ms",
    "time/data_wait_ms": "Waiting for data, ms of a step",
    "memory/peak_gib": "Peak memory, GiB",
    "train/grad_norm": "Gradient norm before clipping",
    "train/lr": "Learning rate",
}
_LEFT_OUT = ("start/", "checkpoint/expected", "eval/per_class/")
_MOST_EVALUATED = 4
_MOST_FURTHER = 24


@dataclass(frozen=True)
class Named:
    """A run's curves under the name that the report gives it.

    Attributes:
        name: Of the run.
        curves: Its metrics.
        colour: Of its lines.
    """

    name: str
    curves: RunCurves
    colour: int


def main_charts(runs: Sequence[Named]) -> list[Html]:
    """Loss, evaluations, rates, memory: one chart each, a line a run; what no run has is left out."""
    evaluated = {tag: tag.removeprefix(EVALUATION) for tag in _evaluation_tags(runs)}
    marks = [mark for run in runs for mark in _marks(run)]
    titles = _FIRST | evaluated | _LATER
    return [_chart(title, tag, runs, marks) for tag, title in titles.items() if _any_has(runs, tag)]


def further_charts(run: Named) -> list[Html]:
    """Everything else that a run wrote, several curves a chart, by the part of their names before the last slash."""
    shown = {*_FIRST, *_LATER, *_evaluation_tags([run])}
    groups: dict[str, list[str]] = {}
    for name in run.curves.traces:
        if name not in shown and not name.startswith(_LEFT_OUT):
            groups.setdefault(name.rpartition("/")[0] or name, []).append(name)
    charts = [chart for group, tags in sorted(groups.items()) for chart in _group(group, tags, run)]
    left = len(charts) - _MOST_FURTHER
    more = [tag("p", f"{left} more charts: TensorBoard has them all.", class_="soft")] if left > 0 else []
    return charts[:_MOST_FURTHER] + more


def _group(group: str, tags: Sequence[str], run: Named) -> Iterator[Html]:
    for start in range(0, len(tags), NUM_COLOURS):
        part = tags[start : start + NUM_COLOURS]
        curves = [
            Curve(name.removeprefix(f"{group}/"), run.curves.traces[name], number) for number, name in enumerate(part)
        ]
        yield line_chart(group, curves, _marks(run))


def _chart(title: str, name: str, runs: Sequence[Named], marks: Sequence[Mark]) -> Html:
    having = [run for run in runs if name in run.curves.traces]
    return line_chart(title, [Curve(run.name, run.curves.traces[name], run.colour) for run in having], marks)


def _any_has(runs: Sequence[Named], name: str) -> bool:
    return any(name in run.curves.traces for run in runs)


def _marks(run: Named) -> Iterator[Mark]:
    """Where a process began that went on with the run."""
    lost = dict(run.curves.superseded)
    for first in run.curves.starts[1:]:
        steps = lost.get(first - 1, 0)
        yield Mark(first, f"{run.name} went on at step {first}" + f", {steps} steps done again" * bool(steps))


def _evaluation_tags(runs: Sequence[Named]) -> list[str]:
    """The first metric of each kind of shape, and of a task without such kinds the first few."""
    names = [name.removeprefix(EVALUATION) for run in runs for name in main_metrics(run.curves.last_evaluation)]
    kinds = {name.partition("_")[0] if name.startswith(("box_", "mask_")) else name: name for name in reversed(names)}
    return [EVALUATION + name for name in list(reversed(kinds.values()))[:_MOST_EVALUATED]]


def main_metrics(evaluation: Mapping[str, object]) -> list[str]:
    """The names of an evaluation's metrics, those of single classes left out."""
    return [name for name in evaluation if name.startswith(EVALUATION) and "/" not in name.removeprefix(EVALUATION)]
