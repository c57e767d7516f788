"""Rates over a sliding window and the time left: pure arithmetic on what it is given."""

from __future__ import annotations

from collections import deque


class RateMeter:
    """Amounts per second, over the last steps.

    Args:
        window: Steps that count; the first of a process are slow, and so forgotten after this many.
    """

    def __init__(self, window: int = 50) -> None:
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=window)

    def add(self, amount: float, seconds: float, waiting_seconds: float = 0.0) -> None:
        """Adds a step that took ``seconds`` for ``amount``, ``waiting_seconds`` of them idle."""
        self._steps.append((amount, seconds, waiting_seconds))

    @property
    def rate(self) -> float:
        """Amount per second, 0 before the first step."""
        amount, seconds, _ = self._sums()
        return amount / seconds if seconds > 0 else 0.0

    @property
    def seconds_per_step(self) -> float:
        """Mean duration of a step, 0 before the first."""
        return self._sums()[1] / len(self._steps) if self._steps else 0.0

    @property
    def waiting_share(self) -> float:
        """Share of the time spent waiting, 0 to 1."""
        _, seconds, waiting = self._sums()
        return min(waiting / seconds, 1.0) if seconds > 0 else 0.0

    def _sums(self) -> tuple[float, float, float]:
        amounts, seconds, waits = zip(*self._steps, strict=True) if self._steps else ((), (), ())
        return sum(amounts), sum(seconds), sum(waits)


def duration_text(seconds: float) -> str:
    """A duration for people: ``45 s``, ``12:05`` (minutes), ``3:20:00`` (hours), ``2 d 05:00`` (days and hours)."""
    whole = round(seconds)
    minutes, hours, days = whole // 60 % 60, whole // 3600 % 24, whole // 86400
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}"
    if hours:
        return f"{hours}:{minutes:02d}:{whole % 60:02d}"
    return f"{minutes}:{whole % 60:02d}" if minutes else f"{whole} s"
