"""A job's logs: finding them, and following them until the job has ended."""

from __future__ import annotations

import codecs
import glob
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from piip_scale.launch.spec import JobSpec

_POLL_S = 0.5
_ASK_EVERY_S = 5.0
_BLOCK_BYTES, _MOST_OF_LINE = 1 << 16, 1 << 24
_DECODER = codecs.getincrementaldecoder("utf-8")


def find_logs(spec: JobSpec) -> list[Path]:
    """The logs of a run's jobs, the one written last at the end."""
    return sorted(map(Path, glob.glob(log_glob(spec))), key=_written_unix_s)


def _written_unix_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def log_of(spec: JobSpec, job_id: int) -> Path:
    """The log of one job, or of the run's task in an array."""
    task = str(spec.array_task)
    return Path(_filled(spec.log, {"j": str(job_id), "A": str(job_id), "a": task}, lambda text: text))


def log_glob(spec: JobSpec) -> str:
    """A pattern for ``glob`` of all logs of a run."""
    return _filled(spec.log, {"j": "[0-9]*", "A": "[0-9]*", "a": str(spec.array_task)}, glob.escape)


def sizes(paths: Iterable[Path]) -> dict[Path, int]:
    """How long files are by now, those that are gone left out."""
    found = {}
    for path in paths:
        with suppress(OSError):
            found[path] = path.stat().st_size
    return found


def tail(path: Path, num_lines: int, size: int | None = None) -> str:
    r"""The last lines of a file, read from its end: a log may be of gigabytes.

    Only ``\n`` ends a line; a progress bar, which redraws itself by ``\r``, is part of one. Of a line of many MiB the
    end comes.

    Args:
        path: The file.
        num_lines: How many.
        size: So many bytes of it; all where ``None``.
    """
    blocks: list[bytes] = []
    with path.open("rb") as file:
        left, num_ends, since_end = file.seek(0, os.SEEK_END) if size is None else size, 0, 0
        # One more than asked for: that of the line before.
        while left and num_lines and num_ends <= num_lines and since_end < _MOST_OF_LINE:
            block = min(_BLOCK_BYTES, left)
            left -= block
            file.seek(left)
            blocks.append(file.read(block))
            ends = blocks[-1].count(b"\n")
            num_ends, since_end = num_ends + ends, 0 if ends else since_end + block
    lines = b"".join(reversed(blocks)).split(b"\n")
    last = lines.pop()
    lines = [line + b"\n" for line in lines] + ([last] if last else [])
    return b"".join(lines[-num_lines:]).decode("utf-8", errors="replace") if num_lines else ""


def follow(
    logs: Callable[[], list[Path]],
    is_over: Callable[[], bool],
    *,
    shown: Mapping[Path, int] | None = None,
    poll_s: float = _POLL_S,
    ask_every_s: float = _ASK_EVERY_S,
) -> Iterator[str]:
    """What is written to logs, piece by piece, those that appear later included, until it is over and all is read.

    Args:
        logs: The files there are by now.
        is_over: Whether nothing will be written any more; asked seldom, since it asks the controller.
        shown: How many bytes of each have been shown already; none of the others.
        poll_s: How often to look into the files.
        ask_every_s: How often to ask whether it is over.
    """
    readings = {path: _Reading(size) for path, size in (shown or {}).items()}
    asked_s = -float("inf")
    over = False
    while True:
        for path in logs():
            yield from _new_text(path, readings)
        if over:
            return
        if time.monotonic() - asked_s >= ask_every_s:
            # Once more round after it is over: its last lines may have come since.
            over, asked_s = is_over(), time.monotonic()
            if over:
                continue
        time.sleep(poll_s)


@dataclass
class _Reading:
    """How far a log was read; a letter may be half there."""

    offset: int = 0
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: _DECODER(errors="replace"))


def _new_text(path: Path, readings: dict[Path, _Reading]) -> Iterator[str]:
    reading = readings.setdefault(path, _Reading())
    with path.open("rb") as file:
        # One that has shrunk was begun anew.
        file.seek(reading.offset if reading.offset <= os.fstat(file.fileno()).st_size else 0)
        while content := file.read(_BLOCK_BYTES):
            reading.offset = file.tell()
            yield reading.decoder.decode(content)


def _filled(pattern: str, values: dict[str, str], literal: Callable[[str], str]) -> str:
    """Slurm's pattern with its ``%`` fields replaced, and ``%%`` by one ``%``."""
    parts = pattern.split("%%")
    filled = []
    for part in parts:
        pieces = part.split("%")
        text = literal(pieces[0])
        for piece in pieces[1:]:
            text += values[piece[0]] + literal(piece[1:])
        filled.append(text)
    return literal("%").join(filled)
