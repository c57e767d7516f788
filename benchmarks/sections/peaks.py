"""The most that a rank's tensors hold in a step, by torch's own record of what is allocated and freed."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Peaks:
    """The most bytes of tensors that were alive at one time.

    Attributes:
        before: When the step began.
        passes: In the forward and backward passes, the messages of their gradients among them.
        update: In the update, and what follows it.
    """

    before: int
    passes: int
    update: int

    @property
    def most(self) -> int:
        """In the whole step."""
        return max(self.passes, self.update)


class Ledger:
    """Every allocation of a rank's CPU in a step, what operators take and give back inside themselves included.

    What another thread frees, as gloo's do with some messages, stays in it until its place is taken again.

    Args:
        before: Bytes alive when it is opened.
    """

    def __init__(self, before: int) -> None:
        self._before = before
        self._updating_ns = 0
        self._changes: list[tuple[int, int, int]] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        """Records a step."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield
        assert profiler.profiler is not None
        self._changes = sorted(_changes(profiler.profiler.kineto_results.experimental_event_tree()))

    def begin_update(self) -> None:
        """Now the passes end."""
        self._updating_ns = time.time_ns()

    def peaks(self) -> Peaks:
        """Of the step."""
        alive = self._before
        passes, update = alive, 0
        sizes: dict[int, int] = {}
        for at_ns, address, change in self._changes:
            # What is allocated where something was had been freed by another thread.
            alive += change - (sizes.pop(address, 0) if change > 0 else 0)
            if change > 0:
                sizes[address] = change
            else:
                sizes.pop(address, None)
            if at_ns < self._updating_ns:
                passes = max(passes, alive)
            else:
                update = max(update, alive)
        return Peaks(self._before, passes, update)


def _changes(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """When, where and by how many bytes memory is allocated and, below zero, freed."""
    open_ones = list(events)
    while open_ones:
        event = open_ones.pop()
        open_ones += event.children
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size


def tensors() -> list[Tensor]:
    """All that Python can reach."""
    return [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter)]


def alive_bytes(others: Sequence[weakref.ref[Tensor]]) -> int:
    """Of every tensor but others, once by storage."""
    known = {id(other()) for other in others}
    own = [tensor.untyped_storage() for tensor in tensors() if id(tensor) not in known]
    return sum({storage.data_ptr(): storage.nbytes() for storage in own}.values())
