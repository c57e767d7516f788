"""metrics.jsonl: one JSON object a line, for scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from piip_scale.files import write_text_atomically


class JsonLines:
    """Appends to a file of JSON objects that each carry a ``step``.

    Args:
        path: The file; made where absent.
        first_step: Steps done before; lines of later ones, left by a process that went further than its last
            checkpoint, are removed, and so is a line that a kill cut short.

    Raises:
        OSError: The disk refuses.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        if path.exists():
            _forget(path, first_step)
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


def _forget(path: Path, first_step: int) -> None:
    text = path.read_text(encoding="utf-8")
    kept = "".join(f"{line}\n" for line in text.splitlines() if _step_of(line) <= first_step)
    if kept != text:
        write_text_atomically(path, kept)


def _step_of(line: str) -> float:
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
