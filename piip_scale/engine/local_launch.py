"""Starting the ranks of one machine, and ending them all when one ends badly."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from piip_scale.engine.stop import unsaved
from piip_scale.errors import Interrupted, LostRankError, RunError
from piip_scale.logging import get_logger
from piip_scale.run.ending import Ending, ending_of
from piip_scale.run.reasons import COMMUNICATION
from piip_scale.run.run_dir import RunDirectory
from piip_scale.world import World, held_port, usable_cores

_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def launch_local(
    num_procs: int,
    command: Sequence[str],
    run: RunDirectory,
    *,
    grace_s: float = 10.0,
) -> int:
    """Runs a command once for each rank, with torchrun's variables set, and waits for all.

    The command is the same that torchrun or srun would start, ``train_worker`` at its end: it finds its rank in the
    environment. SIGINT, SIGTERM and SIGUSR2 are passed on; a second SIGINT ends all ranks at once. When a rank
    fails, the others get ``grace_s`` to end by themselves. No rank outlives this process.

    Args:
        num_procs: Ranks.
        command: Program and arguments.
        run: The run's directory, where a failing rank leaves its error; the caller has had it ``check``ed.
        grace_s: Between the first failure and the kill, in seconds.

    Returns:
        The exit code for this process: 0 where every rank ended well, 130 where they stopped as asked, else that of
        the rank that failed first. The ranks have reported to the user already.

    Raises:
        LostRankError: A rank failed without a word of its own, as one killed by the system does.
        Interrupted: A second SIGINT came, or one before a rank could listen that leaves rank 0 without a word.
    """
    run.clear_traces()
    ranks = _Ranks(run)
    _attend(ranks, num_procs, command, grace_s)
    return _verdict(ranks, run)


def launch_without_run(num_procs: int, command: Sequence[str], *, grace_s: float = 10.0) -> int:
    """As ``launch_local``, for ranks that have no run: of those that fail, one says why on its own standard error.

    Args:
        num_procs: Ranks.
        command: Program and arguments.
        grace_s: As there.

    Returns:
        As there.

    Raises:
        LostRankError: The system killed a rank.
        Interrupted: A second SIGINT came.
    """
    ranks = _Ranks(None)
    _attend(ranks, num_procs, command, grace_s)
    if ranks.killed_by_user:
        raise Interrupted("stopped by a second Ctrl-C")
    if ranks.was_asked and ranks.first_failure is not None:
        return Interrupted.exit_code
    if ranks.unreported is not None:
        raise ranks.unreported
    return ranks.first_failure[1] if ranks.first_failure else 0


def _attend(ranks: _Ranks, num_procs: int, command: Sequence[str], grace_s: float) -> None:
    # Before any rank is there: one that is asked to stop in its first moments would leave this process unprepared.
    previous = {number: signal.signal(number, ranks.forward) for number in _FORWARDED}
    try:
        with held_port() as port:
            ranks.start(num_procs, command, port)
            ranks.wait(grace_s)
    finally:
        ranks.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _verdict(ranks: _Ranks, run: RunDirectory) -> int:
    # Before anything else: ranks that were killed here have not failed by themselves.
    if ranks.killed_by_user:
        error = unsaved()
        raise _noted(error, run, ending_of(error))
    if ranks.first_failure is None:
        return 0
    if ranks.stopped_as_asked:
        if ranks.main_spoke:
            return Interrupted.exit_code
        error = Interrupted("stopped as asked before rank 0 could say so", fix="begin again with the same command")
        before = run.status()
        # What an earlier attempt left there stays true where this one had not begun.
        raise _noted(error, run, ending_of(error)) if before and before.state == "running" else error
    rank, code = ranks.first_failure
    unreported = ranks.unreported or _silent_failure(rank, code)
    if ranks.unreported or run.record_error(rank, unreported):
        raise _noted(unreported, run, run.first_error() or ending_of(unreported, rank))
    first = run.first_error()
    if first is None:
        return code
    # Again, now that all ranks have ended: another may have written at the same moment that it runs.
    _note(run, first)
    return first.exit_code


def _noted(error: RunError, run: RunDirectory, ending: Ending) -> RunError:
    _note(run, ending)
    return error


def _note(run: RunDirectory, ending: Ending) -> None:
    if run.status():
        run.write_failure(ending)


def _is_told_of(run: RunDirectory, error: RunError, rank: int) -> bool:
    """Puts a rank's end in the place of another's lost contact with it, which was faster on a busy machine."""
    first = run.first_error()
    if first is None or first.reason != COMMUNICATION or first.rank == rank:
        return False
    run.replace_ending(ending_of(error, rank, first.step))
    return True


def _silent_failure(rank: int, code: int) -> LostRankError:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return LostRankError(
        f"rank {rank} {how} before it could say why",
        fix="look above for its last words; SIGKILL mostly means that the machine ran out of memory",
    )


class _Ranks:
    """The processes of the ranks.

    Attributes:
        first_failure: Rank and return code of the first that ended badly.
        killed_by_user: A second Ctrl-C came.
        unreported: The error of a rank that the system killed, where nobody reported it to the user.
    """

    def __init__(self, run: RunDirectory | None) -> None:
        self.first_failure: tuple[int, int] | None = None
        self.killed_by_user = False
        self.unreported: RunError | None = None
        self._run = run
        self._interrupts = 0
        self._asked: set[int] = set()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._are_started = False
        self._early: list[int] = []

    def start(self, num_procs: int, command: Sequence[str], port: int) -> None:
        """Starts them, to meet at a port, and passes on what came meanwhile."""
        threads = max(1, usable_cores() // num_procs)
        shared = dict(os.environ) | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        for rank in range(num_procs):
            world = World(rank, num_procs, rank, num_procs, "127.0.0.1", port)
            self._processes.append(_start(command, shared | world.as_environment()))
        self._are_started = True
        for number in self._early:
            self._send(number)

    def wait(self, grace_s: float) -> None:
        """Until all ended, or ``grace_s`` after the first that failed."""
        deadline = float("inf")
        while any(process.poll() is None for process in self._processes) and time.monotonic() < deadline:
            self._note_failure()
            if self.killed_by_user:
                return
            if self.first_failure and deadline == float("inf"):
                deadline = time.monotonic() + grace_s
            time.sleep(_POLL_S)
        self._note_failure()

    def forward(self, number: int, _frame: FrameType | None) -> None:
        """Passes a signal on, once; a second SIGINT means now."""
        self._interrupts += number == signal.SIGINT
        self._asked.add(number)
        if self._interrupts > 1:
            self.killed_by_user = True
        elif self._are_started:
            self._send(number)
        else:
            self._early.append(number)

    @property
    def was_asked(self) -> bool:
        """A signal was passed on."""
        return bool(self._asked)

    @property
    def stopped_as_asked(self) -> bool:
        """The first that ended badly did so for a signal that was passed on; before a rank listens that kills it."""
        return self.first_failure is not None and self._is_stop(self.first_failure[1])

    @property
    def main_spoke(self) -> bool:
        """Rank 0 ended by itself as asked, with a line of its own."""
        return self._processes[0].returncode == Interrupted.exit_code

    def kill(self) -> None:
        """Ends every rank that still runs, with the processes it started."""
        for rank, process in enumerate(self._processes):
            if process.poll() is None:
                get_logger(__name__).debug("killing rank %d", rank)
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _is_stop(self, code: int) -> bool:
        return code == Interrupted.exit_code or -code in self._asked

    def _note_failure(self) -> None:
        if self.first_failure is not None:
            return
        codes = [process.poll() for process in self._processes]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        # Of several in one glance, a rank that a signal took, or that stopped as asked, is the cause, others its echo.
        self.first_failure = min(failed, key=lambda item: item[1] > 0 and not self._is_stop(item[1]), default=None)
        if self.first_failure and self.first_failure[1] < 0 and not self.stopped_as_asked:
            # Claimed at once: the others, which have lost contact, wait a moment before they report it.
            error, rank = _silent_failure(*self.first_failure), self.first_failure[0]
            is_first = self._run is None or self._run.record_error(rank, error) or _is_told_of(self._run, error, rank)
            self.unreported = error if is_first else None


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # A session of its own: a terminal's Ctrl-C then reaches a rank once, through us, and killpg takes loader workers.
    return subprocess.Popen(command, env=dict(environment), start_new_session=True, preexec_fn=_dying_with_parent())


def _dying_with_parent() -> Callable[[], object] | None:
    """What a child calls so that Linux kills it when its parent dies, even by SIGKILL."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec a child should not load libraries
    return functools.partial(prctl, _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
