"""``piip-scale report``: how runs go, as one HTML file that opens anywhere; without torch."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piip_scale.config.differences import differing_keys, resolved_keys
from piip_scale.launch.bottleneck import Limit, what_limits
from piip_scale.launch.report_charts import EVALUATION, Named, further_charts, main_charts
from piip_scale.launch.run_curves import RunCurves, read_curves
from piip_scale.launch.run_pictures import last_pictures
from piip_scale.launch.runs import Row
from piip_scale.launch.words import duration
from piip_scale.pages.charts import chip
from piip_scale.pages.html import Html, document, joined, picture, table, tag
from piip_scale.run.run_dir import RunDirectory
from piip_scale.run.warned import Warned, warnings_of
from piip_scale.tasks.score_parts import Scored, class_bars, score_tiles

_MOST_DIFFERENCES = 200
_MOST_EVENTS = 30
_CURVES = (
    "By optimiser step. A line is the mean of neighbouring steps, the band around it their extremes. Dashed lines are "
    "restarts, red ticks values that are not finite."
)
_TONES = {
    "good": ("running", "done"),
    "busy": ("queued", "submitted", "waiting", "stopping"),
    "odd": ("stopped", "cancelled", "held", "empty"),
}


@dataclass(frozen=True)
class Reported:
    """All that the report shows of a run.

    Attributes:
        row: Its state.
        curves: Its metrics.
        config: Its resolved config by key; empty where that cannot be read.
        changed: Keys that its last resume changed, with both values.
        environment: Versions, machine and command, as far as they can be read.
    """

    row: Row
    curves: RunCurves
    config: Mapping[str, str]
    changed: Mapping[str, Sequence[str | None]]
    environment: Mapping[str, Any]


def read_reported(row: Row) -> Reported:
    """A run's files as the report needs them; what is absent or broken is left out.

    Args:
        row: Its state, as ``jobs`` has it.
    """
    files = RunDirectory(row.run)
    config, resumed = _config(files.config), _config(files.resumed_config)
    changed = differing_keys([config, resumed]) if resumed else {}
    return Reported(row, read_curves(row.run), config, changed, _environment(files.environment))


def report_page(runs: Sequence[Reported], now_unix_s: float | None = None) -> bytes:
    """The page.

    Args:
        runs: At least one.
        now_unix_s: When it is made.
    """
    names = _short_names([run.row.run for run in runs])
    named = [Named(name, run.curves, number) for number, (name, run) in enumerate(zip(names, runs, strict=True))]
    when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(now_unix_s))
    title = f"{names[0]}: how it goes" if len(runs) == 1 else f"{len(runs)} runs: how they go"
    now_s = time.time() if now_unix_s is None else now_unix_s
    cards = [_card(run, name, number, now_s) for number, (name, run) in enumerate(zip(names, runs, strict=True))]
    sections = [
        tag("section", joined(cards), class_="grid pair" if len(runs) > 1 else None),
        _section("Curves", joined([tag("p", _CURVES, class_="soft"), tag("div", *main_charts(named), class_="grid")])),
        _section("Last evaluation", _evaluations(named)),
        *(_pictures(run, name) for run, name in zip(runs, names, strict=True)),
        _section("Where their configs differ", _differences(runs, names)) if len(runs) > 1 else "",
        *(_details(run, name, alone=len(runs) == 1) for run, name in zip(named, names, strict=True)),
        *(_events(run, name) for run, name in zip(runs, names, strict=True)),
    ]
    return document(title, *filter(None, sections), note=f"piip-scale report, {when}")


def _config(path: Path) -> dict[str, str]:
    with suppress(OSError):
        return resolved_keys(path)
    return {}


def _environment(path: Path) -> Mapping[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        return found if isinstance(found, dict) else {}
    return {}


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The runs' own names; with the folders above where two are called alike."""
    absolute = [path.absolute() for path in paths]
    for depth in range(1, max(len(path.parts) for path in absolute)):
        names = ["/".join(path.parts[-depth:]) for path in absolute]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in absolute]


def _section(title: str, content: Html | str) -> Html | str:
    return tag("section", tag("h2", title), content) if content else ""


def _card(run: Reported, name: str, number: int, now_unix_s: float) -> Html:
    state = tag("span", run.row.state, class_=f"state {_tone(run.row.state)}")
    facts = [tag("dt", key) + tag("dd", value) for key, value in _facts(run, now_unix_s).items() if value]
    return tag(
        "article",
        tag("div", tag("h3", chip(number), name), state, class_="head"),
        tag("div", tag("i", style=f"width:{_share(run.row):.1%}"), class_="bar"),
        *(tag("p", warned.line, class_="warned") for warned in _warnings(run.curves)),
        tag("div", tag("dl", *map(Html, facts)), _limit(what_limits(run.curves.last_steps)), class_="halves"),
        class_="card",
    )


def _warnings(curves: RunCurves) -> Sequence[Warned]:
    """What is wrong, of a run at rest what was at its last step."""
    return warnings_of(curves.last_steps[-1]) if curves.last_steps else ()


def _limit(limit: Limit) -> Html:
    parts = [(name, share, _part_colour(place)) for place, (name, share) in enumerate(limit.shares.items())]
    bars = [tag("i", style=f"width:{share:.1%};background:{colour}", title=name) for name, share, colour in parts]
    keys = [
        tag("li", tag("i", class_="chip", style=f"background:{colour}"), f"{name} {share:.0%}")
        for name, share, colour in parts
    ]
    split = [tag("div", *bars, class_="bar split"), tag("ul", *keys, class_="key")] if parts else []
    verdict, *more = limit.sentences
    return tag("div", tag("h3", "What limits a step"), tag("p", verdict), *split, *(tag("p", text) for text in more))


def _part_colour(place: int) -> str:
    """Waiting in a colour of its own, and what is done in shades of one: runs have all other colours."""
    return f"rgba(var(--hot), {max(1.05 - 0.25 * place, 0.2):.2f})" if place else "var(--wait)"


def _facts(run: Reported, now_unix_s: float) -> dict[str, Html | str]:
    row = run.row
    return {
        "step": f"{row.step}" + (f" of {row.total_steps}, {_share(row):.0%}" if row.total_steps else ""),
        "time to go": _time_to_go(row.eta_s, now_unix_s),
        "images/s": f"{row.images_per_second:.4g}" if row.images_per_second is not None else "",
        "last sign": f"{duration(row.seen_s)} ago" if row.seen_s is not None else "",
        "restarts": _restarts(run),
        "goodput": _goodput(run.curves),
        "process" if ":" in row.job else "job": row.job if row.job != "-" else "",
        "last event": row.event,
        "note": _notes(run.curves),
        "command": _command(run.environment),
    }


def _time_to_go(eta_s: float | None, now_unix_s: float) -> str:
    """With the hour of the end: a page is read later than it is made."""
    if eta_s is None:
        return ""
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(now_unix_s + eta_s))
    return f"{duration(eta_s)}, until {end}, without saves and evaluations"


def _share(row: Row) -> float:
    return min(row.step / row.total_steps, 1.0) if row.total_steps else 0.0


def _tone(state: str) -> str:
    return next((tone for tone, states in _TONES.items() if state in states), "bad")


def _restarts(run: Reported) -> str:
    number = max(run.row.restarts, len(run.curves.starts) - 1, 0)
    lost = sum(steps for _, steps in run.curves.superseded)
    return f"{number}" + f", {lost} steps done again" * bool(lost)


def _goodput(curves: RunCurves) -> str:
    last = curves.last_steps[-1] if curves.last_steps else {}
    share, hours = last.get("run/goodput"), last.get("run/gpu_hours")
    if not (isinstance(share, float) and isinstance(hours, float)):
        return ""
    return f"{share:.0%} of {hours:.3g} GPU hours since the first start"


def _notes(curves: RunCurves) -> str:
    bad = f"{curves.bad_lines} line(s) of its metrics cannot be read" if curves.bad_lines else ""
    return "; ".join(filter(None, (curves.problem, bad)))


def _command(environment: Mapping[str, Any]) -> Html | str:
    words = environment.get("command")
    if not isinstance(words, list):
        return ""
    # A line may end between arguments, and not after each hyphen.
    return tag("code", joined((tag("span", shlex.quote(str(word))) for word in words), " "))


def _evaluations(runs: Sequence[Named]) -> Html | str:
    evaluated = [run for run in runs if run.curves.last_evaluation]
    if not evaluated:
        return ""
    alone = len(runs) == 1
    steps = [
        tag("li", "" if alone else chip(run.colour), f"{run.name} " * (not alone), f"step {step}")
        for run in evaluated
        if (step := run.curves.last_evaluation["step"])
    ]
    scored = [Scored("" if alone else run.name, _scores(run.curves.last_evaluation), run.colour) for run in evaluated]
    return joined([tag("ul", *steps, class_="key"), score_tiles(scored), class_bars(scored)])


def _scores(evaluation: Mapping[str, object]) -> dict[str, float]:
    """Its metrics as a task names them; what is no number, as NaN is not in JSON, counts as none."""
    return {
        name.removeprefix(EVALUATION): float(value) if isinstance(value, float | int) else -1.0
        for name, value in evaluation.items()
        if name.startswith(EVALUATION)
    }


def _pictures(run: Reported, name: str) -> Html | str:
    found = last_pictures(run.row.run)
    figures = [
        tag("figure", picture(path.content, path.kind, path.name), tag("figcaption", path.name)) for path in found
    ]
    note = tag("p", "The truth on the left, what was found on the right.", class_="soft")
    return _section(f"Pictures of {name}", joined([note, tag("div", *figures, class_="grid pair")])) if figures else ""


def _differences(runs: Sequence[Reported], names: Sequence[str]) -> Html:
    known = [(name, run.config) for name, run in zip(names, runs, strict=True) if run.config]
    unknown = [name for name, run in zip(names, runs, strict=True) if not run.config]
    notes = [tag("p", f"no config can be read of: {', '.join(unknown)}", class_="soft")] if unknown else []
    rows = differing_keys([config for _, config in known]) if len(known) > 1 else {}
    if not rows:
        return joined([tag("p", "in no key"), *notes])
    shown = [[key, *(value if value is not None else "-" for value in row)] for key, row in rows.items()]
    if len(shown) > _MOST_DIFFERENCES:
        notes.append(tag("p", f"{len(shown) - _MOST_DIFFERENCES} more keys differ", class_="soft"))
    heads = ["key", *(name for name, _ in known)]
    return joined([table(heads, shown[:_MOST_DIFFERENCES], class_="words"), *notes])


def _details(run: Named, name: str, *, alone: bool) -> Html | str:
    charts = further_charts(run, alone=alone)
    if not charts:
        return ""
    return tag("details", tag("summary", f"All other curves of {name}"), tag("div", *charts, class_="grid"))


def _events(run: Reported, name: str) -> Html | str:
    events = list(run.curves.events)[-_MOST_EVENTS:]
    changed = [
        tag("li", f"the last resume changed {key}: {was} became {now}") for key, (was, now) in run.changed.items()
    ]
    lines = [tag("li", tag("small", f"step {step} "), text) for step, text in reversed(events)]
    if not lines and not changed:
        return ""
    return _section(f"What happened to {name}, the newest first", tag("ol", *changed, *lines, class_="log card"))
