"""A run's pace from its metrics.jsonl, read from its end: it may be long, and several commands ask often."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from piip_scale.run.warned import Warned, warnings_of

METRICS_FILE = "metrics.jsonl"
_TAIL_BYTES = 1 << 16
_STEPS_AVERAGED = 20
# So many times the usual step is no longer a slow one.
_STILL = 10
# No clock shows a later end; what a file says that would take so long is no measurement.
_LONGEST_S = 1e10
# Whole numbers that no float holds end arithmetic.
_MOST_DIGITS = 15
_START, _CHECKPOINT, _EVENT = b'"kind": "start"', b'"kind": "checkpoint"', b'"kind": "event"'
_WRITE = "checkpoint/write_seconds"
_SAVES_READ, _SAVES_WITHIN_BYTES = 10, 1 << 26


@dataclass(frozen=True)
class Pace:
    """How far and how fast a run is, by its own metrics.

    Attributes:
        step: Last optimiser step that was written.
        total_steps: Of the whole run; ``None`` before its first step.
        images_per_second: Over the steps since the line before.
        seconds_per_step: Mean of the last steps written, saves, evaluations and steps that stood still left out.
        event: Its last event, in one line.
        unix_time_s: When the last of it was written.
        warnings: What was wrong with it at its last step.
    """

    step: int = 0
    total_steps: int | None = None
    images_per_second: float | None = None
    seconds_per_step: float | None = None
    event: str = ""
    unix_time_s: float = 0.0
    warnings: tuple[Warned, ...] = ()

    def eta_s(self, step: int) -> float | None:
        """Seconds from a step to the end at this pace; ``None`` where it is not known."""
        if self.total_steps is None or self.seconds_per_step is None:
            return None
        eta_s = max(self.total_steps - step, 0) * self.seconds_per_step
        return eta_s if eta_s < _LONGEST_S else None


@dataclass(frozen=True)
class SaveTimes:
    """How long this run's saves and steps took at most, of those that were measured; 0 where none was.

    Attributes:
        save_s: From the first still moment to the checkpoint being visible.
        step_s: Of the last steps written.
        expected_save_s: What the ranks expected of a first save, where none was measured.
    """

    save_s: float = 0.0
    step_s: float = 0.0
    expected_save_s: float = 0.0


def read_save_times(run_dir: Path) -> SaveTimes:
    """The times of a run's last saves and steps; nothing where they cannot be read."""
    with (
        suppress(OSError, ValueError),
        (run_dir / METRICS_FILE).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        saves = [_number(line, "checkpoint/stall_seconds") + _number(line, _WRITE) for line in _saves(content)]
        steps = [_number(line, "time/step_ms") / 1e3 for line in _lines(content[max(len(content) - _TAIL_BYTES, 0) :])]
        expected_s = 0.0 if saves else _number(_last(content, _START), "checkpoint/expected_seconds")
        return SaveTimes(max(saves, default=0.0), max(steps[-_STEPS_AVERAGED:], default=0.0), expected_s)
    return SaveTimes()


def _saves(content: mmap.mmap) -> Iterator[dict[str, Any]]:
    """The last lines about saves, which may stand far before the end."""
    offset, first = len(content), max(len(content) - _SAVES_WITHIN_BYTES, 0)
    for _ in range(_SAVES_READ):
        offset = content.rfind(_CHECKPOINT, first, offset)
        if offset < 0:
            return
        begin, end = content.rfind(b"\n", 0, offset) + 1, content.find(b"\n", offset)
        yield from _lines(content[begin : end if end >= 0 else len(content)])


def _number(line: dict[str, Any], key: str) -> float:
    value = line.get(key)
    # json reads NaN and Infinity, which somebody else may have written.
    if not isinstance(value, float | int) or isinstance(value, bool):
        return 0.0
    return float(value) if math.isfinite(value) else 0.0


def read_pace(run_dir: Path) -> Pace:
    """The pace of a run; of one that has not begun, or whose file cannot be read, nothing is known."""
    with (
        suppress(OSError, ValueError),
        (run_dir / METRICS_FILE).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return replace(_pace(content), unix_time_s=os.fstat(file.fileno()).st_mtime)
    return Pace()


def _pace(content: mmap.mmap) -> Pace:
    lines = list(_lines(content[max(len(content) - _TAIL_BYTES, 0) :]))
    steps = [line for line in lines if line.get("kind") == "step"][-_STEPS_AVERAGED:]
    written = [ms for line in steps if (ms := _number(line, "time/step_ms"))]
    times = [ms for ms in written if ms <= longest_step(written)]
    rate = _number(steps[-1], "throughput/images_per_second") if steps else 0.0
    return Pace(
        step=int(steps[-1]["step"]) if steps else 0,
        total_steps=_total_steps(content),
        images_per_second=rate or None,
        seconds_per_step=sum(times) / len(times) / 1e3 if times else None,
        # It may stand far before the end: between two saves there are thousands of steps.
        event=str(_last(content, _EVENT).get("text", "")),
        warnings=warnings_of(steps[-1]) if steps else (),
    )


def longest_step(times: Collection[float]) -> float:
    """How long a step may take by the others, beyond which it stood still: a stopped process, a disk that was gone.

    In a mean, one such step would hide all others.
    """
    return _STILL * median(times) if times else 0.0


def _total_steps(content: mmap.mmap) -> int | None:
    total = _last(content, _START).get("total_steps")
    return int(total) if isinstance(total, int) else None


def _last(content: mmap.mmap, kind: bytes) -> dict[str, Any]:
    """The last line of a kind; empty where there is none."""
    offset = content.rfind(kind)
    begin, end = content.rfind(b"\n", 0, max(offset, 0)) + 1, content.find(b"\n", max(offset, 0))
    lines = _lines(content[begin : end if end >= 0 else len(content)]) if offset >= 0 else iter(())
    return next(lines, {})


def _lines(text: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects in it; the first and the last line may be cut."""
    yield from filter(None, map(parse_line, text.splitlines()))


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """A line of a run's metrics; ``None`` where it is none, as one that is half written."""
    with suppress(ValueError, RecursionError):
        line = json.loads(raw, parse_int=_whole)
        if isinstance(line, dict) and type(line.get("step")) is int:
            return line
    return None


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)
