"""How long a step's forward and backward passes take, read without a wait for the device."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

_MARKS_A_MICRO_BATCH = 3


class PassClock:
    """Marks of a step: before each micro-batch's forward pass, after it, and after its backward pass.

    On a GPU they are events in its queue, which cost the host microseconds; elsewhere the host's clock.
    """

    def __init__(self) -> None:
        self._marks: list[float | torch.cuda.Event] = []

    def mark(self, device: torch.device) -> None:
        """Sets the next mark, behind whatever the device has been given so far."""
        if device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> tuple[float, float]:
        """Of all forward and of all backward passes; waits for the last mark where the host has not yet."""
        if self._marks and not isinstance(last := self._marks[-1], float):
            last.synchronize()  # type: ignore[no-untyped-call]
        spans = [_between(*pair) for pair in pairwise(self._marks)]
        return sum(spans[0::_MARKS_A_MICRO_BATCH]), sum(spans[1::_MARKS_A_MICRO_BATCH])


def _between(first: float | torch.cuda.Event, last: float | torch.cuda.Event) -> float:
    if isinstance(first, float) and isinstance(last, float):
        return last - first
    milliseconds: float = first.elapsed_time(last)  # type: ignore[union-attr, arg-type]
    return milliseconds / 1e3
