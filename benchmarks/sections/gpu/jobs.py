"""Jobs of a section: each gives one row, and an error of one is a row too."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Values = dict[str, Any]
ROW = "ROW "
"""What a line of a section's process begins with that holds a row; others are its log."""
BROKEN_DEVICE = 3
"""Exit code of a process whose device takes no more work: another one does the rest."""


@dataclass(frozen=True)
class Setting:
    """What all jobs of a section share.

    Attributes:
        device: Where to measure.
        rehearse: At toy sizes, to see that everything runs; the figures mean nothing.
    """

    device: torch.device
    rehearse: bool

    def size(self, real: int, toy: int) -> int:
        """A size, or what stands for it in a rehearsal."""
        return toy if self.rehearse else real


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        name: Of its row, unique in the section.
        run: Measures, and returns the row's values.
    """

    name: str
    run: Callable[[], Values]


def run_jobs(jobs: Sequence[Job], done: Collection[str], seconds: float) -> Iterator[tuple[str, Values]]:
    """Runs jobs one after the other until they or the time are out.

    Args:
        jobs: Of a section.
        done: Names of those that have their row already.
        seconds: No job begins later.

    Yields:
        Name and values of each; of one that failed the error, since the others may still hold results.
    """
    started = time.monotonic()
    for job in jobs:
        if job.name in done:
            continue
        if time.monotonic() - started > seconds:
            return
        begun = time.monotonic()
        try:
            values = job.run()
        except Exception as error:  # noqa: BLE001 - it becomes the row, and nothing is left out silently
            values = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        yield job.name, values | {"took_s": round(time.monotonic() - begun, 1)}


def print_rows(jobs: Sequence[Job], done: Collection[str], seconds: float) -> None:
    """``run_jobs`` for a section's own process: rows go to the standard output, a line each."""
    for name, values in run_jobs(jobs, done, seconds):
        print(ROW + json.dumps({"name": name} | values), flush=True)
        if is_device_broken(values):
            sys.exit(BROKEN_DEVICE)


def is_device_broken(values: Values) -> bool:
    """Whether an error left the device unusable for this process: after an illegal access every call fails."""
    error = str(values.get("error", ""))
    return "CUDA error" in error or "illegal memory access" in error or "device-side assert" in error
