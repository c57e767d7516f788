"""A job's logs: finding them, and following them until the job has ended."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from piip_scale.launch.spec import JobSpec

_POLL_S = 0.5
_ASK_EVERY_S = 5.0


def find_logs(spec: JobSpec) -> list[Path]:
    """The logs of a run's jobs, the one written last at the end."""
    return sorted(map(Path, glob.glob(log_glob(spec))), key=lambda path: path.stat().st_mtime)


def log_of(spec: JobSpec, job_id: int) -> Path:
    """The log of one job, or of the run's task in an array."""
    task = str(spec.array_task)
    return Path(_filled(spec.log, {"j": str(job_id), "A": str(job_id), "a": task}, lambda text: text))


def log_glob(spec: JobSpec) -> str:
    """A pattern for ``glob`` of all logs of a run."""
    return _filled(spec.log, {"j": "[0-9]*", "A": "[0-9]*", "a": str(spec.array_task)}, glob.escape)


def tail(path: Path, num_lines: int) -> str:
    """The last lines of a file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return "".join(text.splitlines(keepends=True)[-num_lines:]) if num_lines else ""


def follow(
    logs: Callable[[], list[Path]],
    is_over: Callable[[], bool],
    *,
    from_start: bool = True,
    poll_s: float = _POLL_S,
    ask_every_s: float = _ASK_EVERY_S,
) -> Iterator[str]:
    """What is written to logs, piece by piece, those that appear later included, until it is over and all is read.

    Args:
        logs: The files there are by now.
        is_over: Whether nothing will be written any more; asked seldom, since it asks the controller.
        from_start: Begin with what is in them already.
        poll_s: How often to look into the files.
        ask_every_s: How often to ask whether it is over.
    """
    places: dict[Path, int] = {} if from_start else {path: path.stat().st_size for path in logs()}
    asked_s = -float("inf")
    over = False
    while True:
        for path in logs():
            yield from _new_text(path, places)
        if over:
            return
        if time.monotonic() - asked_s >= ask_every_s:
            # Once more round after it is over: its last words may have come since.
            over, asked_s = is_over(), time.monotonic()
            if over:
                continue
        time.sleep(poll_s)


def _new_text(path: Path, places: dict[Path, int]) -> Iterator[str]:
    with path.open("rb") as file:
        file.seek(places.get(path, 0))
        content = file.read()
        places[path] = file.tell()
    if content:
        yield content.decode("utf-8", errors="replace")


def _filled(pattern: str, values: dict[str, str], literal: Callable[[str], str]) -> str:
    """Slurm's pattern with its ``%`` words replaced, and ``%%`` by one ``%``."""
    parts = pattern.split("%%")
    filled = []
    for part in parts:
        pieces = part.split("%")
        text = literal(pieces[0])
        for piece in pieces[1:]:
            text += values[piece[0]] + literal(piece[1:])
        filled.append(text)
    return literal("%").join(filled)
