"""metrics.jsonl: one JSON object a line, for scripts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from piip_scale.files import atomic_file
from piip_scale.run.warned import WARNED_AT


class JsonLines:
    """Appends to a file of JSON objects that each carry a ``step``.

    Args:
        path: The file; made where absent.
        first_step: Steps done before; lines of later ones, left by a process that went further than its last
            checkpoint, move to the end of ``superseded_path(path)``, and so does a line that a kill cut short.

    Raises:
        OSError: The disk refuses.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        if path.exists():
            _supersede(path, first_step)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Adds one line and hands it to the operating system."""
        # Bare NaN is not JSON; a reader of another language would stop at it.
        content = {"step": step, "kind": kind} | {key: _plain(value) for key, value in values.items()}
        self._file.write(json.dumps(content, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_events(path: Path) -> list[tuple[int, str]]:
    """Step and text of a file's events, in order; none where there is no file.

    Raises:
        OSError: The disk refuses.
    """
    return [(int(event["step"]), str(event["text"])) for event in _of_kind(path, "event")]


def read_incidents(path: Path) -> list[tuple[int, str, float]]:
    """Step, text and time of the events that are warnings; none where there is no file.

    Raises:
        OSError: The disk refuses.
    """
    events = [event for event in _of_kind(path, "event") if isinstance(event.get(WARNED_AT), float)]
    return [(int(event["step"]), str(event["text"]), event[WARNED_AT]) for event in events]


def evaluated_steps(path: Path) -> set[int]:
    """Steps after which the file has an evaluation; none where there is no file.

    Raises:
        OSError: The disk refuses.
    """
    return {int(evaluation["step"]) for evaluation in _of_kind(path, "evaluation")}


def _of_kind(path: Path, kind: str) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    quoted = f'"kind": "{kind}"'.encode()
    with path.open("rb") as file:
        return [json.loads(line) for line in file if quoted in line]


def last_number(path: Path, key: str) -> float:
    """The last finite number that a file's lines have under a key; 0 where there is none, or no file.

    Raises:
        OSError: The disk refuses.
    """
    if not path.exists():
        return 0.0
    found, quoted = 0.0, json.dumps(key).encode()
    with path.open("rb") as file:
        for line in file:
            if quoted in line and isinstance(value := json.loads(line).get(key), int | float):
                found = float(value)
    return found


def last_steps(paths: Iterable[Path]) -> dict[str, int]:
    """The highest step of each kind of line in these files, as far as they are there.

    Raises:
        OSError: The disk refuses.
    """
    found: dict[str, int] = {}
    for path in filter(Path.exists, paths):
        with path.open("rb") as file:
            for line in file:
                with suppress(ValueError, KeyError, TypeError):
                    values = json.loads(line)
                    found[values["kind"]] = max(found.get(values["kind"], 0), int(values["step"]))
    return found


def superseded_path(path: Path) -> Path:
    """Where a file's superseded lines are: ``metrics.superseded.jsonl`` for ``metrics.jsonl``."""
    return path.with_name(f"{path.stem}.superseded{path.suffix}")


def _supersede(path: Path, first_step: int) -> None:
    """Moves lines that are not of the curve that goes on; copied before they are cut, so that a kill loses none."""
    with path.open("rb") as file:
        superseded = [line for line in file if not _is_current(line, first_step)]
    if superseded:
        _append_superseded(superseded_path(path), superseded, first_step)
    with path.open("rb") as file, atomic_file(path) as kept:
        kept.writelines(_ended(line) for line in file if _is_current(line, first_step))


def _append_superseded(path: Path, lines: Iterable[bytes], first_step: int) -> None:
    header = {
        "step": first_step,
        "kind": "superseded",
        "text": f"the lines below went further than step {first_step}, from which the run went on",
        "unix_time_s": time.time(),
    }
    with path.open("ab") as file:
        file.write(json.dumps(header).encode() + b"\n")
        file.writelines(map(_ended, lines))
        file.flush()
        os.fsync(file.fileno())


def _ended(line: bytes) -> bytes:
    return line if line.endswith(b"\n") else line + b"\n"


def _is_current(line: bytes, first_step: int) -> bool:
    """Whether a line is whole and of a step that stays."""
    return _step_of(line) <= first_step


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value
