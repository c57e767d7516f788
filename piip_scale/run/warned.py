"""What is wrong with a run, as its lines of ``metrics.jsonl`` say it: written beside each step for as long as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WARNINGS = "warnings"
"""Of a step's line: what was wrong then."""
LASTS_STEPS = 20
"""Logged steps in a row without its cause after which a warning goes."""
WARNED_AT = "warned_unix_s"
"""Of an event's line: when it happened, where it is a warning."""


@dataclass(frozen=True)
class Warned:
    """Something that is wrong, or was a short time ago.

    Attributes:
        step: Since when it is, or when it was.
        text: One sentence.
    """

    step: int
    text: str

    @property
    def line(self) -> str:
        """With its step."""
        return f"step {self.step}: {self.text}"


def warnings_of(line: Mapping[str, Any]) -> tuple[Warned, ...]:
    """What a step's line says is wrong; nothing of a line without it, or of an earlier version."""
    found = line.get(WARNINGS)
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    return tuple(
        Warned(row["step"], row["text"])
        for row in rows
        if isinstance(row.get("step"), int) and isinstance(row.get("text"), str)
    )
