"""How long a run takes to its first step, phase by phase."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = "/proc/{process}/stat"
_START_TIME_FIELD = 19
"""Of what follows the command's name in ``stat``: clock ticks from the machine's start to the process's."""


class StartClock:
    """Seconds of the phases of a start, one after the other since the process began.

    Where the system does not show when that was, the first phase counts from when this object was made.

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


def process_age_seconds(pid: int | None = None) -> float:
    """How long ago this process, or another of this machine, began; 0 where the system does not show it."""
    try:
        text = Path(_STAT.format(process="self" if pid is None else pid)).read_text()
    except OSError:
        return 0.0
    started = int(text.rpartition(")")[2].split()[_START_TIME_FIELD]) / os.sysconf("SC_CLK_TCK")
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
