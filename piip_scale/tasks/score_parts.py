"""Scores as parts of a page: the overall ones as tiles, single classes as bars; without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from piip_scale.pages.charts import NUM_COLOURS, chip, colour_of
from piip_scale.pages.html import Html, joined, tag
from piip_scale.tasks.metric_words import kind_of, measure_of, title_of, words_of

PER_CLASS = "per_class/"
_SHARES = "Shares, 0 to 1."
_ABSENT = " -1 is no score: the set holds no object, image or pixel of that class or size, and the mean leaves it out."
# More are no longer compared by eye, and make a page of megabytes.
_MOST_CLASSES = 80
_MOST_LETTERS = 18


@dataclass(frozen=True)
class Scored:
    """What was evaluated once.

    Attributes:
        name: Beside its numbers; empty where it is the page's only one.
        metrics: As ``Metric.compute`` gives them.
        colour: Of its bars.
    """

    name: str
    metrics: Mapping[str, float]
    colour: int = 0

    def of(self, metric: str) -> float:
        """A metric's value; -1 where it has none."""
        value = self.metrics.get(metric, -1.0)
        return -1.0 if math.isnan(value) else value


def score_tiles(scored: Sequence[Scored]) -> Html:
    """A tile for each overall measure: a row a run, boxes beside masks; the best of the runs is bold."""
    names = list(dict.fromkeys(name for one in scored for name in one.metrics if "/" not in name))
    measures: dict[str, list[str]] = {}
    for name in names:
        measures.setdefault(measure_of(name), []).append(name)
    tiles = [_tile(measure, metrics, scored) for measure, metrics in measures.items()]
    is_absent = any(one.of(name) == -1 for one in scored for name in one.metrics)
    return joined([tag("div", *tiles, class_="tiles"), tag("p", _SHARES + _ABSENT * is_absent, class_="soft")])


def class_bars(scored: Sequence[Scored]) -> Html:
    """A bar for each class and run, by what is measured of single classes; the best of the first run come first."""
    shown = scored[:NUM_COLOURS]
    parts = [name.split("/") for one in shown for name in one.metrics if name.startswith(PER_CLASS)]
    # Other versions' files may have names without a class.
    measures = dict.fromkeys(part[1] for part in parts if len(part) > 2)
    return joined([_bars(measure, shown) for measure in measures])


def score_text(value: float) -> str:
    """A share to three digits, and -1 where there is none."""
    return "-1" if value == -1 or math.isnan(value) else f"{value:.3f}"


def _tile(measure: str, metrics: Sequence[str], scored: Sequence[Scored]) -> Html:
    having = [one for one in scored if any(metric in one.metrics for metric in metrics)]
    best = {metric: max(one.of(metric) for one in having) for metric in metrics}
    kinds = [kind_of(metric) for metric in metrics]
    head = tag("tr", tag("td"), *(tag("td", kind) for kind in kinds), class_="soft") if any(kinds) else ""
    rows = [
        tag(
            "tr",
            tag("td", chip(one.colour) if one.name else "", title=one.name or None),
            *(tag("td", _best_bold(one.of(metric), best[metric]), title=metric) for metric in metrics),
        )
        for one in having
    ]
    words = tag("small", words_of(measure))
    return tag("div", tag("h3", title_of(measure)), tag("table", head, *rows), words, class_="tile")


def _best_bold(value: float, best: float) -> Html:
    return tag("b" if value == best != -1 else "span", score_text(value))


def _bars(measure: str, scored: Sequence[Scored]) -> Html:
    prefix = f"{PER_CLASS}{measure}/"
    having = [one for one in scored if any(name.startswith(prefix) for name in one.metrics)]
    found = dict.fromkeys(name for one in having for name in one.metrics if name.startswith(prefix))
    ranked = sorted(found, key=lambda name: -having[0].of(name))
    left = max(len(ranked) - _MOST_CLASSES, 0)
    kept = ranked[: _MOST_CLASSES // 2] + ranked[_MOST_CLASSES // 2 + left :]
    letters = min(max(len(name) - len(prefix) for name in kept), _MOST_LETTERS)
    rows = [
        tag("li", tag("span", name.removeprefix(prefix)), tag("div", *(_bar(one, name) for one in having)))
        for name in kept
    ]
    note = tag("p", f"the best and the worst; {left} classes between are left out", class_="soft") if left else ""
    bars = tag("ul", *rows, class_="classes card", style=f"--letters:{letters}")
    return joined([tag("h3", f"{title_of(measure)} by class"), bars, note])


def _bar(one: Scored, metric: str) -> Html:
    width = f"width:{max(min(one.of(metric), 1.0), 0.0):.1%};background:{colour_of(one.colour)}"
    # A class that only the others have is no class without objects.
    text = score_text(one.of(metric)) if metric in one.metrics else "-"
    return tag("div", tag("span", tag("i", style=width), class_="bar"), tag("small", text))
