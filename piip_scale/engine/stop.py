"""Being asked to stop: a signal sets a flag, and the ranks leave together after the step."""

from __future__ import annotations

import signal
import time
from types import FrameType

from piip_scale.errors import Interrupted

# SIGUSR1 is NCCL's at times; SIGUSR2 is what the sbatch script forwards before the time limit.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
# Two deliveries of one Ctrl-C (from the terminal and from a launcher) come within milliseconds, a second one later.
_IMPATIENCE_S = 2.0


class StopFlag:
    """Set by SIGINT, SIGTERM or SIGUSR2; a second Ctrl-C interrupts at once.

    Attributes:
        signal_name: The signal that came, empty before.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._since_s = 0.0

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def install(self) -> None:
        """Takes the signals over. Main thread only."""
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal_name and number == signal.SIGINT and now - self._since_s > _IMPATIENCE_S:
            raise KeyboardInterrupt
        if not self.signal_name:
            self.signal_name, self._since_s = signal.Signals(number).name, now


def unsaved() -> Interrupted:
    """What a second Ctrl-C ends a run with."""
    return Interrupted(
        "ended by a second Ctrl-C before it could save", fix="continue from its last checkpoint with --resume"
    )
