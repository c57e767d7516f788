"""What is wrong with an input: gathered, so that all of it is reported at once, or left out where that is asked for."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from piip_scale.data.reading.files import write_bytes
from piip_scale.errors import DataError
from piip_scale.logging import get_logger

MOST_SHOWN = 10

Part = Literal["image", "annotation", "file"]
"""What a problem is about, and what is left out because of it."""


class ProblemsError(DataError):
    """Several problems of one input; the message holds the first ones.

    Attributes:
        lines: All, a line each.
        summary: How many, and what to do, without the problems.
    """

    lines: tuple[str, ...] = ()
    summary = ""


@dataclass
class Problems:
    """The problems of one input.

    Attributes:
        skip: Go on without what is broken.
        report: A file that all problems are written to.
        found: What they are about, and the errors.
        notes: What was mended or is worth knowing, a line each.
    """

    skip: bool = False
    report: Path | None = None
    found: list[tuple[Part, DataError]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def collected(self, part: Part) -> Iterator[None]:
        """Takes down an error instead of raising it."""
        try:
            yield
        except DataError as error:
            self.found.append((part, error))

    def num_skipped(self) -> dict[str, int]:
        """How much is left out, by what it is, for the manifest."""
        counts = Counter(part for part, _ in self.found)
        return {f"num_skipped_{part}s": counts[part] for part in sorted(counts)} if self.skip else {}

    @property
    def stop(self) -> bool:
        """Whether there are problems that nobody asked to skip."""
        return bool(self.found) and not self.skip

    def settle(self, source: str) -> None:
        """Writes the report and ends the work, unless there is nothing wrong or the broken is skipped.

        Raises:
            DataError: The problem where there is one, a ``ProblemsError`` where there are several.
        """
        lines = [error.line for _, error in self.found]
        if self.report is not None:
            write_bytes(self.report, "".join(f"{line}\n" for line in lines).encode())
        if self.stop:
            raise self.found[0][1] if len(lines) == 1 else _several(lines, source, self.report)
        if lines:
            logger, what = get_logger(__name__), ", ".join(f"{n} {k}" for k, n in self._counts().items())
            for line in lines[:MOST_SHOWN]:
                logger.warning("left out: %s", line)
            logger.warning("%s: left out what is broken: %s%s", source, what, _where_all(lines, self.report))

    def _counts(self) -> dict[str, int]:
        return {f"{part}s": count for part, count in Counter(part for part, _ in self.found).items()}


def _several(lines: list[str], source: str, report: Path | None) -> ProblemsError:
    shown = "; ".join(f"({number}) {line}" for number, line in enumerate(lines[:MOST_SHOWN], 1))
    fix = f"correct them, or leave out what is broken with --skip-broken{_where_all(lines, report)}"
    error = ProblemsError(f"{source} has {len(lines)} problems: {shown}", fix=fix)
    error.lines, error.summary = tuple(lines), f"{source} has {len(lines)} problems; {fix}"
    return error


def _where_all(lines: list[str], report: Path | None) -> str:
    if report is not None:
        return f"; all are in {report}"
    return f"; --report FILE takes all {len(lines)}" if len(lines) > MOST_SHOWN else ""
