"""How long a run takes to its first step, phase by phase."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/self/stat")
_START_TIME_FIELD = 19
"""Of what follows the command's name in ``stat``: clock ticks from the machine's start to the process's."""


class StartClock:
    """Seconds of the phases of a start, one after the other since the process began.

    Where the system does not tell when that was, the first phase counts from when this object was made.

    Attributes:
        seconds: Of each phase that is over, by name, in order.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic() - process_age_seconds()

    def end_phase(self, name: str) -> None:
        """Ends a phase: what has passed since the one before is its time."""
        now = time.monotonic()
        self.seconds[name] = now - self._last
        self._last = now


def process_age_seconds() -> float:
    """How long ago this process began; 0 where the system does not tell."""
    if not _STAT.is_file():
        return 0.0
    fields = _STAT.read_text().rpartition(")")[2].split()
    started = int(fields[_START_TIME_FIELD]) / os.sysconf("SC_CLK_TCK")
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
