"""A run's metrics.jsonl as curves for people: read once from its begin, in bounded memory however long it is."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from piip_scale.launch.run_metrics import parse_line
from piip_scale.pages.trace import Trace
from piip_scale.run.run_dir import RunDirectory
from piip_scale.run.warned import LASTS_STEPS

# What limits a step and what is wrong with it are to agree.
_STEPS_KEPT = LASTS_STEPS
_EVENTS_KEPT = 100
# As the files hold values that are no JSON.
_NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@dataclass
class RunCurves:
    """What a run wrote of itself.

    Attributes:
        traces: By tag, over optimiser steps.
        last_steps: The last steps' lines, for what is only asked of the present.
        starts: The first step of each process, in order.
        events: The last events: step and text.
        last_evaluation: The newest evaluation's metrics, with its step under ``step``; empty before it.
        superseded: Of each return to an earlier checkpoint, the step it went back to and how many steps were lost.
        bad_lines: Lines that could not be read, such as one that is half written.
        problem: Why the file cannot be read, in one line.
    """

    traces: dict[str, Trace] = field(default_factory=lambda: defaultdict(Trace))
    last_steps: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=_STEPS_KEPT))
    starts: list[int] = field(default_factory=list)
    events: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=_EVENTS_KEPT))
    last_evaluation: Mapping[str, Any] = field(default_factory=dict)
    superseded: list[tuple[int, int]] = field(default_factory=list)
    bad_lines: int = 0
    problem: str = ""


def read_curves(run_dir: Path) -> RunCurves:
    """The curves of a run; a run without metrics has none, and a line that is broken is passed over and counted."""
    files, found = RunDirectory(run_dir), RunCurves()
    try:
        for line in _lines(files.metrics, found):
            _take(found, line)
        found.superseded = list(_returns(files.superseded_metrics))
    except FileNotFoundError:
        found.problem = "it wrote no metrics"
    except OSError as error:
        found.problem = f"its metrics cannot be read: {error.strerror}"
    return found


def _lines(path: Path, counts: RunCurves) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for raw in file:
            if (line := parse_line(raw)) is not None:
                yield line
            else:
                counts.bad_lines += 1


def _take(found: RunCurves, line: dict[str, Any]) -> None:
    step, kind = line["step"], line.get("kind")
    if kind == "start":
        found.starts.append(step)
    elif kind == "event":
        found.events.append((step, str(line.get("text", ""))))
        return
    elif kind == "step":
        found.last_steps.append(line)
    elif kind == "evaluation":
        found.last_evaluation = line
    for tag, value in line.items():
        number = _NOT_FINITE.get(value) if isinstance(value, str) else value
        if not isinstance(number, float | int) or isinstance(number, bool) or tag in ("step", "total_steps"):
            continue
        # COCO's -1 stands for no objects, and is no score.
        if kind != "evaluation" or number != -1:
            found.traces[tag].add(step, number)


def _returns(path: Path) -> Iterator[tuple[int, int]]:
    """Where the run went back to, and how many steps it had done beyond, by the lines that were set aside."""
    first: int | None = None
    furthest = 0
    if not path.is_file():
        return
    for line in _lines(path, RunCurves()):
        if line.get("kind") == "superseded":
            if first is not None:
                yield first, max(furthest - first, 0)
            first, furthest = line["step"], 0
        furthest = max(furthest, line["step"])
    if first is not None:
        yield first, max(furthest - first, 0)
