"""Signals that reach all processes of a job and are for the first alone: processes that it forks act on none."""

from __future__ import annotations

import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager


@contextmanager
def held_back(numbers: Collection[int]) -> Iterator[None]:
    """Signals wait while the context lasts, and in a process that is forked meanwhile for ``leave_to_parent``.

    One that came before a forked process ignores it would end that, or run there what its parent does.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(numbers: Collection[int]) -> None:
    """Ignores signals in this forked process, those that wait among them."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
