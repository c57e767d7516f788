"""An evaluation as one HTML file: what was scored, where it goes wrong, and pictures of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from piip_scale.pages.charts import NUM_COLOURS, Curve, line_chart
from piip_scale.pages.html import Html, document, joined, picture, table, tag
from piip_scale.pages.trace import Trace
from piip_scale.tasks.cases import DrawnCase, jpeg_bytes
from piip_scale.tasks.charts import draw_confusion
from piip_scale.tasks.detection.error_kinds import KINDS, ErrorKinds
from piip_scale.tasks.drawing import png_bytes
from piip_scale.tasks.metric_words import KINDS_OF_SHAPES, measure_of, words_of
from piip_scale.tasks.report import Report

_MOST_CELLS = 24
_MOST_PAIRS = 15
_ABSENT = (
    "-1 is no score: the set holds no object, image or pixel of that class or size, and the mean leaves it out. "
    "All others are shares, 0 to 1."
)


@dataclass(frozen=True)
class Evaluated:
    """What a page is of.

    Attributes:
        metrics: As ``Metric.compute`` gives them.
        report: Of the same.
        source: What was evaluated: model and set, in one line.
        best: Images that went best, drawn.
        worst: Images that went worst.
    """

    metrics: Mapping[str, float]
    report: Report
    source: str = ""
    best: Sequence[DrawnCase] = field(default_factory=tuple)
    worst: Sequence[DrawnCase] = field(default_factory=tuple)


def evaluation_page(evaluated: Evaluated) -> bytes:
    """The page."""
    report = evaluated.report
    numbers = [
        _section("Scores", _metrics(evaluated.metrics)),
        *(_section(f"Errors by kind ({part})", _errors(found)) for part, found in report.errors.items()),
        *(_section(f"Precision by recall ({part})", _curves(report, part)) for part in report.curves),
    ]
    sections = [
        tag("div", *numbers, class_="grid pair"),
        _cases("Where it went worst", evaluated.worst),
        _cases("Where it went best", evaluated.best),
        _section("What is taken for what", _confusion(report)),
        _section("By class", _classes(report)),
    ]
    return document("Evaluation", *filter(None, sections), note=evaluated.source)


def _section(title: str, *content: Html | str) -> Html:
    return tag("section", tag("h2", title), *content)


def _metrics(metrics: Mapping[str, float]) -> Html:
    """A row a measure; a column for boxes and one for masks where they are scored."""
    wholes = {name: value for name, value in metrics.items() if "/" not in name}
    kinds = [kind for kind in KINDS_OF_SHAPES if any(name.startswith(f"{kind}_") for name in wholes)] or [""]
    measures = dict.fromkeys(measure_of(name) for name in wholes)
    rows = [
        [
            measure,
            *(_score(wholes.get(f"{kind}_{measure}" if kind else measure, -1)) for kind in kinds),
            words_of(measure),
        ]
        for measure in measures
    ]
    heads = ["measure", *(kind or "value" for kind in kinds), "meaning"]
    return joined([table(heads, rows, class_="words"), tag("p", _ABSENT, class_="soft")])


def _score(value: float) -> str:
    if value == -1 or math.isnan(value):
        return "-1"
    return f"{value:.0f}" if float(value).is_integer() and value > 1 else f"{value:.4f}"


def _errors(found: ErrorKinds) -> Html:
    most = max(found.costs.values(), default=0.0)
    rows = [[name, found.counts[name], _cost(found.costs[name], most), KINDS[name]] for name in KINDS]
    note = (
        f"Average precision at an IoU of 0.5 is {found.ap50:.4f}. What it would gain if all errors of one kind were "
        "mended, each kind for itself; of all detections, whatever they score. The kinds are TIDE's."
    )
    heads = ["kind", "errors", "AP50 to gain", "a detection"]
    return joined([table(heads, rows, class_="words"), tag("p", note, class_="soft")])


def _cost(cost: float, most: float) -> Html:
    share = cost / most if most > 0 else 0.0
    bar = tag("div", tag("i", style=f"width:{share:.0%}"), class_="bar")
    return joined([f"{cost:.4f}", bar])


def _curves(report: Report, part: str) -> Html:
    precision = report.curves[part]
    known = [k for k in range(len(report.classes)) if precision[:, k].max(initial=-1) > -1]
    if not known:
        return tag("p", "no class has objects")
    objects = report.columns.get("objects", [0.0] * len(report.classes))
    chosen = sorted(sorted(known, key=lambda k: -objects[k])[: NUM_COLOURS - 1])
    curves = [Curve("mean", _trace(precision[:, known].mean(1)), 0)]
    curves += [Curve(report.classes[k], _trace(precision[:, k]), place) for place, k in enumerate(chosen, start=1)]
    left = len(known) - len(chosen)
    note = f"the {len(chosen)} classes with the most objects; {left} more are in the table below" if left else ""
    chart = line_chart("Precision (up) by recall, IoU of 0.5", curves, note=note, shows_last=False)
    return chart


def _trace(values: npt.NDArray[np.float64]) -> Trace:
    trace = Trace()
    for place, value in enumerate(values.tolist()):
        trace.add(place / max(len(values) - 1, 1), value)
    return trace


def _confusion(report: Report) -> Html:
    counts, names = report.confusion, report.names
    parts = [tag("p", report.confusion_title, class_="soft")]
    if len(names) > len(report.classes):
        parts.append(_matched(counts, names))
    if len(names) <= _MOST_CELLS:
        parts.append(_cells(counts, names))
    else:
        chart = png_bytes(draw_confusion(counts, names, report.confusion_title))
        parts.append(tag("figure", picture(chart, "png", report.confusion_title)))
    return joined([*parts, _pairs(counts, report.classes)])


def _matched(counts: npt.NDArray[np.int64], names: Sequence[str]) -> Html:
    """Of objects and detections together; the last row and column stand for nothing."""
    inner = counts[:-1, :-1]
    right = int(inner.diagonal().sum())
    facts = {
        "objects found as their class": right,
        "objects taken for another class": int(inner.sum()) - right,
        "objects not found": int(counts[:-1, -1].sum()),
        "detections on the background": int(counts[-1, :-1].sum()),
    }
    return table(["objects and detections", "number"], [[name, number] for name, number in facts.items()])


def _cells(counts: npt.NDArray[np.int64], names: Sequence[str]) -> Html:
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    rows = [
        [name, *(_cell(int(number), float(share)) for number, share in zip(counts[row], shares[row], strict=True))]
        for row, name in enumerate(names)
    ]
    return table(["", *names], rows, class_="cells")


def _cell(number: int, share: float) -> Html:
    text = f"{100 * share:.0f}" if number else ""
    return tag("span", text, style=f"--share:{share:.2f}", title=str(number), class_="cell")


def _pairs(counts: npt.NDArray[np.int64], names: Sequence[str]) -> Html | str:
    """Classes that are most often taken for each other."""
    classes = counts[: len(names), : len(names)].copy()
    np.fill_diagonal(classes, 0)
    order = np.argsort(-classes, axis=None, kind="stable")[:_MOST_PAIRS]
    places = [divmod(int(index), len(names)) for index in order]
    rows = [[names[row], names[column], int(classes[row, column])] for row, column in places if classes[row, column]]
    if not rows:
        return ""
    heads = ["is", "taken for", "times"]
    return joined([tag("h3", "The most frequent mistakes"), table(heads, rows, class_="words")])


def _cases(title: str, cases: Sequence[DrawnCase]) -> Html | str:
    if not cases:
        return ""
    figures = [
        tag(
            "figure",
            tag(
                "div",
                *(picture(jpeg_bytes(one), "jpeg", alt) for one, alt in ((case.truth, "truth"), (case.found, "found"))),
            ),
            tag("figcaption", f"{case.key}: {case.words}"),
            class_="sides",
        )
        for case in cases
    ]
    note = tag("p", "The truth on the left, or above; what was found on the right.", class_="soft")
    return _section(title, note, tag("div", *figures, class_="grid pair"))


def _classes(report: Report) -> Html:
    rows = [
        [name, *(_score(values[place]) for values in report.columns.values())]
        for place, name in enumerate(report.classes)
    ]
    return table(["class", *report.columns], rows)
