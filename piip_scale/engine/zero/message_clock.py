"""How long this rank's computing stands still for messages among ranks, read without a wait for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from piip_scale.agreement import is_distributed
from piip_scale.engine.zero.deepspeed_api import Engine


class MessageClock:
    """Adds up the time between a message's begin and its end in the queue that computes; on a CPU the host's.

    What travels beside the computing costs nothing here; the wait for it does. So a rank that is slower than the others
    stands still for less: they wait for it.
    """

    def __init__(self) -> None:
        self._is_used = False
        self._seconds = 0.0
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def still(self, device: torch.device) -> Iterator[None]:
        """What is done inside is a message that the rest of the step waits for; nothing where a rank is alone."""
        if not is_distributed():
            yield
            return
        self._is_used = True
        if device.type != "cuda":
            began = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - began
        elif torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
            yield
        else:
            began_there = _event()
            yield
            self._under_way.append((began_there, _event()))

    def take(self) -> float | None:
        """Seconds since the last call; ``None`` where no message was ever measured.

        On a GPU those of messages that have ended by now: what is under way counts the next time.
        """
        while self._under_way and self._under_way[0][1].query():
            began, ended = self._under_way.popleft()
            self._seconds += began.elapsed_time(ended) / 1e3
        taken, self._seconds = self._seconds, 0.0
        return taken if self._is_used else None


MESSAGES = MessageClock()
"""Of this process: messages are begun in many places."""


def time_gathers(engine: Engine, device: torch.device) -> None:
    """Has the messages timed by which an engine of stage 3 gathers what a module needs, in training."""
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    fetch = coordinator.fetch_sub_module

    def timed(module: Any, forward: bool) -> None:
        if not module.training:
            fetch(module, forward)
            return
        with MESSAGES.still(device):
            fetch(module, forward)

    coordinator.fetch_sub_module = timed


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
