"""Which of a run's curves a report shows, and how it calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from piip_scale.launch.run_curves import RunCurves
from piip_scale.pages.charts import NUM_COLOURS, Curve, Mark, line_chart
from piip_scale.pages.html import Html, tag
from piip_scale.tasks.metric_words import kind_of, title_of

EVALUATION = "eval/"
_FIRST = {"loss/total": "Loss, total"}
_LATER = {
    "throughput/images_per_second": "Images/s, all ranks",
    "throughput/mfu": "MFU, 0 to 1",
    "throughput/model_tflops_per_rank": "Model TFLOP/s of a rank",
    "time/step_ms": "Step, ms",
    "time/data_wait_ms": "Waiting for data, ms of a step",
    "memory/peak_gib": "Peak memory of rank 0, GiB",
    "train/grad_norm": "Gradient norm before clipping",
    "train/lr": "Learning rate",
    "throughput/gpu_utilisation": "GPU utilisation, 0 to 1",
    "run/goodput": "Goodput: share of all GPU time in steps that stay",
}
# Curves of a model's parts, by the beginning of their names: one chart each, which says whether a branch is used.
_BY_PART = {
    "branches/grad_norm_": "Gradient norm by part",
    "branches/gamma_into_": "Interactions' gammas, mean, by the branch they lead into",
    "branches/merging_weight_of_": "Weight in the merged sum, by branch",
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
    """Loss, evaluations, rates, memory: one chart each, a line a run; what no run has is left out.

    Of a run alone those of its branches, too.
    """
    evaluated = {tag: title_of(tag.removeprefix(EVALUATION)) for tag in first_metrics(runs)}
    marks = [mark for run in runs for mark in _marks(run)]
    titles = _FIRST | evaluated | _LATER
    charts = [_chart(title, tag, runs, marks) for tag, title in titles.items() if _any_has(runs, tag)]
    return charts + (_charts_by_group(runs[0], by_part=True) if len(runs) == 1 else [])


def further_charts(run: Named, *, alone: bool = False) -> list[Html]:
    """Everything else that a run wrote, several curves a chart, by the part of their names before the last slash.

    Args:
        run: Whose.
        alone: The main charts have those of its branches.
    """
    charts = _charts_by_group(run) + ([] if alone else _charts_by_group(run, by_part=True))
    left = len(charts) - _MOST_FURTHER
    more = [tag("p", f"{left} more charts: TensorBoard has them all.", class_="soft")] if left > 0 else []
    return charts[:_MOST_FURTHER] + more


def _charts_by_group(run: Named, *, by_part: bool = False) -> list[Html]:
    """Charts of what the main ones leave: of a model's parts, or all others."""
    shown = {*_FIRST, *_LATER, *first_metrics([run])}
    groups: dict[str, list[str]] = {}
    for name in run.curves.traces:
        part = next((prefix for prefix in _BY_PART if name.startswith(prefix)), "")
        if name not in shown and not name.startswith(_LEFT_OUT) and bool(part) == by_part:
            groups.setdefault(part or f"{name.rpartition('/')[0] or name}/", []).append(name)
    return [chart for group, tags in sorted(groups.items()) for chart in _group(group, tags, run)]


def _group(group: str, tags: Sequence[str], run: Named) -> Iterator[Html]:
    for start in range(0, len(tags), NUM_COLOURS):
        part = tags[start : start + NUM_COLOURS]
        curves = [Curve(name.removeprefix(group), run.curves.traces[name], number) for number, name in enumerate(part)]
        yield line_chart(_BY_PART.get(group, group.removesuffix("/")), curves, _marks(run), steps=_steps([run]))


def _chart(title: str, name: str, runs: Sequence[Named], marks: Sequence[Mark]) -> Html:
    having = [run for run in runs if name in run.curves.traces]
    # A title is enough where the page is of one run.
    alone = len(runs) == 1
    curves = [Curve("" if alone else run.name, run.curves.traces[name], run.colour) for run in having]
    return line_chart(title, curves, marks, steps=_steps(runs), is_linear=name.startswith(EVALUATION))


def _steps(runs: Sequence[Named]) -> tuple[float, float]:
    """From the first to the last that any of their curves has."""
    spans = [trace.spans for run in runs for trace in run.curves.traces.values() if trace.spans]
    # Without any there is nothing to draw.
    return min((span[0].first_x for span in spans), default=0), max((span[-1].last_x for span in spans), default=0)


def _any_has(runs: Sequence[Named], name: str) -> bool:
    return any(name in run.curves.traces for run in runs)


def _marks(run: Named) -> Iterator[Mark]:
    """Where a process began that went on with the run."""
    lost = dict(run.curves.superseded)
    for first in run.curves.starts[1:]:
        steps = lost.get(first - 1, 0)
        yield Mark(first, f"{run.name} went on at step {first}" + f", {steps} steps done again" * bool(steps))


def first_metrics(runs: Sequence[Named]) -> list[str]:
    """The tag of the first metric of each kind of shape, and of a task without such kinds of the first few."""
    names = [name.removeprefix(EVALUATION) for run in runs for name in main_metrics(run.curves.last_evaluation)]
    kinds = {kind_of(name) or name: name for name in reversed(names)}
    return [EVALUATION + name for name in list(reversed(kinds.values()))[:_MOST_EVALUATED]]


def main_metrics(evaluation: Mapping[str, object]) -> list[str]:
    """The names of an evaluation's metrics, those of single classes left out."""
    return [name for name in evaluation if name.startswith(EVALUATION) and "/" not in name.removeprefix(EVALUATION)]
