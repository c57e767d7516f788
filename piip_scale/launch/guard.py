"""A parent for the supervisor: where that one is killed, as by a node short of memory, somebody is left to act."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


def leave_guard(after_kill: Callable[[str], int]) -> None:
    """Goes on in a child of this process, which stays behind as its guard; returns in the child alone.

    The guard is what Slurm knows as the batch process: it hands on the signals that it gets, and ends as the child
    does. It does nothing that needs memory, so that the system takes the child first.

    Args:
        after_kill: Called in the guard where a signal killed the child, with how; returns the exit code.
    """
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal that comes before the guard can hand it on waits for that.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDED_ON)
    child = os.fork()
    if child == 0:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    _hand_on_to(child)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        code = after_kill(f"killed ({signal.Signals(-code).name})")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _hand_on_to(child: int) -> None:
    def hand_on(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in _HANDED_ON:
        signal.signal(number, hand_on)
