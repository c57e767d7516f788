"""An evaluation as one HTML file: what was scored, where it goes wrong, and pictures of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from piip_scale.pages.charts import NUM_COLOURS, Curve, line_chart
from piip_scale.pages.html import SORTABLE, Html, document, joined, picture, table, tag
from piip_scale.pages.trace import Trace
from piip_scale.tasks.cases import DrawnCase, jpeg_bytes
from piip_scale.tasks.charts import draw_confusion
from piip_scale.tasks.detection.error_kinds import KINDS, ErrorKinds
from piip_scale.tasks.drawing import png_bytes
from piip_scale.tasks.metric_words import title_of
from piip_scale.tasks.report import Report
from piip_scale.tasks.score_parts import Scored, score_text, score_tiles

_MOST_CELLS = 24
_MOST_PAIRS = 15
_PARTS = {"box": "Boxes", "mask": "Masks"}


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
    errors = [_section(f"Errors by kind ({part})", _errors(found)) for part, found in report.errors.items()]
    sections = [
        _section("Scores", score_tiles([Scored("", evaluated.metrics)])),
        tag("div", *errors, class_="grid pair") if errors else "",
        _section("Precision by recall", _curves(report)) if report.curves else "",
        _section("What is taken for what", _confusion(report)),
        _cases("Where it went worst", evaluated.worst),
        _cases("Where it went best", evaluated.best),
        _section("By class", _classes(report)),
    ]
    return document("Evaluation", *filter(None, sections), note=evaluated.source, sorts=True)


def _section(title: str, *content: Html | str) -> Html:
    return tag("section", tag("h2", title), *content)


def _errors(found: ErrorKinds) -> Html:
    most = max(found.costs.values(), default=0.0)
    rows = [[name, found.counts[name], _cost(found.costs[name], most), KINDS[name]] for name in KINDS]
    note = (
        f"Average precision at an IoU of 0.5 is {found.ap50:.3f}. What it would gain if all errors of one kind were "
        "mended, each kind for itself; of all detections, whatever they score. The kinds are TIDE's."
    )
    heads = ["kind", "errors", "AP50 to gain", "a detection"]
    return joined([table(heads, rows, class_="words"), tag("p", note, class_="soft")])


def _cost(cost: float, most: float) -> Html:
    share = cost / most if most > 0 else 0.0
    bar = tag("div", tag("i", style=f"width:{share:.0%}"), class_="bar")
    return joined([f"{cost:.3f}", bar])


def _curves(report: Report) -> Html:
    charts = [_curves_of(report, part) for part in report.curves]
    note = tag(
        "p", "Precision, upwards, by recall at an IoU of 0.5; beside each name the mean, which is AP50.", class_="soft"
    )
    return joined([note, tag("div", *charts, class_="grid pair")])


def _curves_of(report: Report, part: str) -> Html:
    precision, title = report.curves[part], _PARTS.get(part, part)
    known = [k for k in range(len(report.classes)) if precision[:, k].max(initial=-1) > -1]
    if not known:
        return tag("figure", tag("h3", title), tag("figcaption", "no class has objects"))
    objects = report.columns.get("objects", [0.0] * len(report.classes))
    chosen = sorted(sorted(known, key=lambda k: -objects[k])[: NUM_COLOURS - 1])
    shown = [("mean of all classes", precision[:, known].mean(1))]
    shown += [(report.classes[k], precision[:, k]) for k in chosen]
    curves = [
        Curve(f"{name}: {values.mean():.2f}", _trace(values), place) for place, (name, values) in enumerate(shown)
    ]
    left = len(known) - len(chosen)
    note = f"the {len(chosen)} classes with the most objects; {left} more are in the table below" if left else ""
    return line_chart(title, curves, note=note, shows_last=False, is_linear=True)


def _trace(values: npt.NDArray[np.float64]) -> Trace:
    trace = Trace()
    for place, value in enumerate(values.tolist()):
        trace.add(place / max(len(values) - 1, 1), value)
    return trace


def _confusion(report: Report) -> Html:
    counts, names = report.confusion, report.names
    parts = [_matched(counts)] if len(names) > len(report.classes) else []
    parts.append(tag("p", report.confusion_title, class_="soft"))
    if len(names) <= _MOST_CELLS:
        shown = _cells(counts, names)
    else:
        chart = png_bytes(draw_confusion(counts, names, report.confusion_title))
        shown = tag("figure", picture(chart, "png", report.confusion_title))
    return joined([*parts, tag("div", shown, _pairs(counts, report.classes), class_="beside")])


def _matched(counts: npt.NDArray[np.int64]) -> Html:
    """Of objects and detections together; the last row and column stand for nothing."""
    inner = counts[:-1, :-1]
    right, objects, found = int(inner.diagonal().sum()), int(counts[:-1].sum()), int(counts[:, :-1].sum())
    facts = (
        ("found as their class", right, objects, "objects"),
        ("taken for another class", int(inner.sum()) - right, objects, "objects"),
        ("not found", int(counts[:-1, -1].sum()), objects, "objects"),
        ("on the background", int(counts[-1, :-1].sum()), found, "detections"),
    )
    return tag("div", *(_share_tile(*fact) for fact in facts), class_="tiles")


def _share_tile(title: str, number: int, total: int, what: str) -> Html:
    share = f"{number / total:.0%} of {total} {what}" if total else f"there are no {what}"
    return tag("div", tag("h3", title), tag("b", number), tag("small", share), class_="tile")


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
    return tag("div", tag("h3", "The most frequent mistakes"), table(heads, rows, class_="words"))


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
    columns = [_class_cells(values) for values in report.columns.values()]
    rows = [[name, *(cells[place] for cells in columns)] for place, name in enumerate(report.classes)]
    heads = ["class", *map(title_of, report.columns)]
    note = tag("p", "A click on a heading sorts the table by it.", class_="soft")
    return joined([note, table(heads, rows, class_=f"cells upright {SORTABLE}")])


def _class_cells(values: Sequence[float]) -> list[Html]:
    """Counts as they are; shares on a darker ground where they are better: the weak classes are seen among many."""
    if max(values, default=0.0) > 1:
        return [tag("span", f"{value:.0f}", style="--share:0", class_="cell") for value in values]
    return [tag("span", score_text(v), style=f"--share:{max(v, 0.0):.2f}", class_="cell") for v in values]
