"""Line charts as SVG inside a page: a line of means, the extremes as a band around it, marks where something began."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from piip_scale.pages.html import Html, joined, tag
from piip_scale.pages.trace import Span, Trace

NUM_COLOURS = 8
_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 352, 8, 178
# Beyond it a linear axis shows one end of the values only.
_LOG_FROM = 50.0
# Fewer than three ticks do not say how long the axis is.
_TICKS = 2.5
_LOG_TICKS = 4
# So few points are seen one by one.
_DOTS_UP_TO = 40
_MOST_KEYS = 12
_DIGITS, _MOST_DIGITS = 4, 7


@dataclass(frozen=True)
class Curve:
    """A named trace.

    Attributes:
        name: As its key shows it; empty for a chart's only one.
        trace: Its points.
        colour: Its number; those above ``NUM_COLOURS`` come round again.
    """

    name: str
    trace: Trace
    colour: int = 0

    def last(self, digits: int) -> str:
        """Its name, and its last value."""
        return f"{self.name or 'last'} {number_text(self.trace.last, digits)}"


@dataclass(frozen=True)
class Mark:
    """A place on the x axis.

    Attributes:
        x: Where.
        text: What happened there, shown where a pointer rests.
        colour: Of the curve that it belongs to.
    """

    x: float
    text: str
    colour: int = 0


@dataclass(frozen=True)
class _Axis:
    """From values to places."""

    low: float
    high: float
    first_px: float
    last_px: float
    is_log: bool = False
    is_whole: bool = False

    def place(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.first_px + (at - low) / (high - low) * (self.last_px - self.first_px)

    def ticks(self) -> Iterator[float]:
        if self.is_log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            stride = max(1, math.ceil((last - first) / _LOG_TICKS))
            yield from (10.0**power for power in range(first, last + 1, stride))
            return
        step = _round_step((self.high - self.low) / _TICKS)
        step = max(step, 1.0) if self.is_whole else step
        number = math.ceil(self.low / step - 1e-9)
        while number * step <= self.high + 1e-9 * step:
            yield number * step
            number += 1


def colour_of(number: int) -> str:
    """The style of a curve's colour, light or dark."""
    return f"var(--c{number % NUM_COLOURS})"


def chip(number: int) -> Html:
    """A small square of a curve's colour."""
    return tag("i", class_="chip", style=f"background:{colour_of(number)}")


def line_chart(
    title: str,
    curves: Sequence[Curve],
    marks: Iterable[Mark] = (),
    note: str = "",
    *,
    steps: tuple[float, float] | None = None,
    is_linear: bool = False,
    shows_last: bool = True,
) -> Html:
    """A figure of curves over one x axis; curves without a number are left out, and named.

    Args:
        title: Above it, with the unit.
        curves: In order of their keys.
        marks: Upright lines.
        note: Below the keys.
        steps: The x axis' ends, whole numbers, for charts that are compared; where ``None``, the curves' own.
        is_linear: Of scores, from 0 to 1: never logarithmic, since small values are to look small.
        shows_last: Keys have the curves' last values.
    """
    shown = [curve for curve in curves if curve.trace.spans]
    heading = tag("h3", title)
    if not shown:
        return tag("figure", heading, tag("figcaption", "no finite value so far"))
    across, up = _across(shown, steps), _up(shown, is_linear)
    parts = [
        *_grid(across, up),
        *(_mark(mark, across) for mark in marks if across.low <= mark.x <= across.high),
        *(part for curve in shown for part in _drawn(curve, across, up)),
        *(part for curve in curves for part in _gaps(curve, across)),
    ]
    digits = _digits(up)
    label = f"{title}: " + ", ".join(curve.last(digits) for curve in shown[:_MOST_KEYS])
    picture = tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label)
    notes = [note, "logarithmic" if up.is_log else "", _gap_note(curves)]
    below = tag("figcaption", "; ".join(filter(None, notes))) if any(notes) else ""
    return tag("figure", heading, picture, _keys(curves, digits if shows_last else None), below)


def number_text(value: float, digits: int = _DIGITS) -> str:
    """A number in as few signs as a chart has room for."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[letter]:.{digits}g}{letter}"
    if not 0 < size < 1e-3:
        return f"{value:.{digits}g}"
    factor, power = f"{value:.{digits - _DIGITS + 1}e}".split("e")
    return f"{factor.rstrip('0').removesuffix('.')}e{int(power)}"


def _digits(axis: _Axis) -> int:
    """So many that no two of its ticks read alike."""
    ticks = list(axis.ticks())
    enough = (n for n in range(_DIGITS, _MOST_DIGITS) if len({number_text(tick, n) for tick in ticks}) == len(ticks))
    return next(enough, _MOST_DIGITS)


def _across(curves: Sequence[Curve], steps: tuple[float, float] | None) -> _Axis:
    first, last = steps or (
        min(curve.trace.spans[0].first_x for curve in curves),
        max(curve.trace.spans[-1].last_x for curve in curves),
    )
    return _Axis(first, last if last > first else first + 1, _LEFT, _RIGHT, is_whole=steps is not None)


def _up(curves: Sequence[Curve], is_linear: bool) -> _Axis:
    low, high = min(curve.trace.low for curve in curves), max(curve.trace.high for curve in curves)
    is_log = not is_linear and low > 0 and high / low > _LOG_FROM
    if not is_log:
        room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        # Room below zero would show values that there cannot be.
        # Nor are there scores above 1.
        top = min(high + room, 1.0) if is_linear and high <= 1 else high + room
        low, high = (max(low - room, 0.0) if low >= 0 else low - room), top
    return _Axis(low, high, _BOTTOM, _TOP, is_log)


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return float(next(factor * power for factor in (5, 2, 1) if factor * power <= raw * (1 + 1e-9)))


def _grid(across: _Axis, up: _Axis) -> Iterator[Html]:
    digits = _digits(up)
    for value in up.ticks():
        y = f"{up.place(value):.1f}"
        yield tag("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, style="stroke:var(--grid)")
        yield tag("text", number_text(value, digits), x=_LEFT - 5, y=f"{up.place(value) + 3.5:.1f}", text_anchor="end")
    digits = _digits(across)
    for value in across.ticks():
        x = across.place(value)
        anchor = "end" if x > _RIGHT - 12 else "middle"
        yield tag("text", number_text(value, digits), x=f"{x:.1f}", y=_HEIGHT - 7, text_anchor=anchor)
    yield tag("line", x1=_LEFT, x2=_RIGHT, y1=_BOTTOM, y2=_BOTTOM, style="stroke:var(--line)")


def _mark(mark: Mark, across: _Axis) -> Html:
    x = f"{across.place(mark.x):.1f}"
    style = "stroke:var(--mark);stroke-width:1.2;stroke-dasharray:3 3"
    return tag("g", tag("title", mark.text), tag("line", x1=x, x2=x, y1=_TOP, y2=_BOTTOM, style=style))


def _drawn(curve: Curve, across: _Axis, up: _Axis) -> Iterator[Html]:
    spans, colour = curve.trace.spans, colour_of(curve.colour)
    for run in _unbroken(spans):
        if any(span.count > 1 for span in run):
            tops = [_point(across.place(span.x), up.place(span.high)) for span in run]
            bottoms = [_point(across.place(span.x), up.place(span.low)) for span in reversed(run)]
            yield tag("path", d=f"M{'L'.join([*tops, *bottoms])}Z", style=f"fill:{colour};opacity:.25")
        points = "L".join(_point(across.place(span.x), up.place(span.mean)) for span in run)
        yield tag("path", d=f"M{points}", style=f"fill:none;stroke:{colour};stroke-width:1.6;stroke-linejoin:round")
        if len(spans) <= _DOTS_UP_TO or len(run) == 1:
            for span in run:
                x, y = f"{across.place(span.x):.1f}", f"{up.place(span.mean):.1f}"
                title = tag("title", f"{curve.name} {number_text(span.mean)} at {number_text(span.x)}".lstrip())
                yield tag("circle", title, cx=x, cy=y, r=2.4, style=f"fill:{colour}")


def _unbroken(spans: Sequence[Span]) -> Iterator[list[Span]]:
    run: list[Span] = []
    for span in spans:
        if span.after_gap and run:
            yield run
            run = []
        run.append(span)
    yield run


def _gaps(curve: Curve, across: _Axis) -> Iterator[Html]:
    for x in sorted({f"{across.place(at):.0f}" for at in curve.trace.gaps if across.low <= at <= across.high}):
        yield tag("line", x1=x, x2=x, y1=_BOTTOM - 7, y2=_BOTTOM, style="stroke:var(--bad);stroke-width:2")


def _gap_note(curves: Sequence[Curve]) -> str:
    number = sum(curve.trace.num_gaps for curve in curves)
    return f"{number} value(s) not finite, in red" if number else ""


def _keys(curves: Sequence[Curve], digits_of_last: int | None) -> Html:
    texts = [curve.last(digits_of_last) if digits_of_last else curve.name for curve in curves[:_MOST_KEYS]]
    entries = [tag("li", chip(curve.colour), text) for curve, text in zip(curves, texts, strict=False)]
    if len(curves) > _MOST_KEYS:
        entries.append(tag("li", f"and {len(curves) - _MOST_KEYS} more"))
    return tag("ul", joined(entries), class_="key")


def _point(x: float, y: float) -> str:
    return f"{x:.1f} {y:.1f}"
