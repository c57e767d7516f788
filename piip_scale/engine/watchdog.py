"""A thread of each rank that ends it where its training cannot: when ranks hang, or another has failed.

It needs no collective, no signal and no launcher, only the run directory that all ranks share; so it works the same
under every launcher and with any communication library.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.engine.collective import count_collectives
from piip_scale.engine.save_job import LAST_SECONDS
from piip_scale.errors import HangError
from piip_scale.logging import get_logger
from piip_scale.run.ending import Ending
from piip_scale.run.failing import report_failure
from piip_scale.run.heartbeat import STACK_SIGNAL, Beat, Heartbeat, late_ranks, read_beats
from piip_scale.run.node_beats import NodeBeats
from piip_scale.run.run_dir import RunDirectory, process_start_unix_s
from piip_scale.world import World

_POLLS_PER_LIMIT = 10
_POLL_RANGE_S = (0.1, 2.0)
# A rank whose training can still end by itself knows best how, and a stack is written within a moment.
_LEAVE_AFTER_S = 3.0
# The rank that failed gives a save so long, which is of no use without the parts of all ranks: one that has written its
# own and waits in a collective must not have the launcher end those that still write.
_LEAVE_SAVING_AFTER_S = LAST_SECONDS + _LEAVE_AFTER_S
_STACKS_WITHIN_S = 5.0
# The rank that asked for stacks names who is late within so long, or it is gone itself.
_NAMES_WITHIN_S = 3 * _STACKS_WITHIN_S
_POLLS_COUNTED = 5
# One that goes on after a signal stopped it polls at once; the second poll is for a busy machine.
_POLLS_TO_WAKE = 2
_RANKS_NAMED = 4


class Watchdog:
    """Watches this rank while it is entered as a context.

    Args:
        run: The run's directory.
        world: The ranks.
        heartbeat: What this rank's training marks.
    """

    def __init__(self, run: RunDirectory, world: World, heartbeat: Heartbeat) -> None:
        self._run, self._world, self._heartbeat = run, world, heartbeat
        self._store = CheckpointStore(run.checkpoints, keep=1)
        limit_s = heartbeat.step_limit_s / _POLLS_PER_LIMIT
        self._poll_s = min(max(limit_s, _POLL_RANGE_S[0]), _POLL_RANGE_S[1])
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stack_path = run.stacks / f"rank_{world.rank}.txt"
        self._node = NodeBeats(run, world, self._poll_s, heartbeat.shortest_limit_s)
        self._stack: IO[str] | None = None
        self._mark, self._waited_s, self._failed_since_s = heartbeat.last, 0.0, 0.0

    def __enter__(self) -> Watchdog:
        with suppress(OSError):
            self._run.stacks.mkdir(parents=True, exist_ok=True)
            self._stack = self._stack_path.open("w", encoding="utf-8")
            faulthandler.register(STACK_SIGNAL, self._stack)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._node.close(self._beat())
        if self._stack is not None:
            faulthandler.unregister(STACK_SIGNAL)
            self._stack.close()
            with suppress(OSError):
                if not self._stack_path.stat().st_size:
                    self._stack_path.unlink()

    def _watch(self) -> None:
        before_s = time.monotonic()
        while not self._stopped.wait(self._poll_s):
            now_s = time.monotonic()
            self._count(now_s - before_s)
            before_s = now_s
            own = self._beat()
            news = self._node.exchange(own)
            self._leave_to(news.later, own)
            self._leave_after_others(news.ending)
            if self._waited_s >= self._mark.limit_s:
                self._end()
            elif news.stacks_unix_s >= process_start_unix_s():
                self._write_stack()

    def _count(self, seconds: float) -> None:
        if self._heartbeat.last != self._mark:
            self._mark, self._waited_s = self._heartbeat.last, 0.0
        else:
            # Not the time in which this process was stopped, and perhaps all others with it: that is no hang.
            self._waited_s += min(seconds, _POLLS_COUNTED * self._poll_s)

    def _beat(self) -> Beat:
        mark, rank = self._mark, self._world.rank
        position = (mark.number, count_collectives(), mark.phase, mark.step)
        process = (time.time(), socket.gethostname(), os.getpid())
        return Beat(rank, *position, self._waited_s, *process, mark.limit_s, process_start_unix_s())

    def _leave_to(self, found: Beat | None, own: Beat) -> None:
        """Ends this process where a later one has its place, as on a node that a scheduler gave up for lost.

        Two that train one run at once would overwrite each other's checkpoints.
        """
        if found is not None and found.started_unix_s > own.started_unix_s:
            get_logger(__name__).error(
                "piip-scale: error: process %d on %s trains rank %d of this run now; this one, which is older, ends",
                found.pid,
                found.host,
                found.rank,
            )
            os._exit(1)

    def _leave_after_others(self, first: Ending | None) -> None:
        """Ends this process some moments after another rank reported an error: it may sit in a collective for ever."""
        if first is None or first.rank == self._world.rank:
            return
        self._failed_since_s = self._failed_since_s or time.monotonic()
        patience_s = _LEAVE_SAVING_AFTER_S if self._store.is_saving() else _LEAVE_AFTER_S
        if time.monotonic() - self._failed_since_s > patience_s:
            os._exit(first.exit_code)

    def _write_stack(self) -> None:
        if self._stack is not None and not os.fstat(self._stack.fileno()).st_size:
            faulthandler.dump_traceback(self._stack)

    def _end(self) -> None:
        limit_s = self._mark.limit_s
        self._write_stack()
        if not self._may_name_the_late():
            return
        # Read before anything is woken, which would go on.
        beats = {beat.rank: beat for beat in read_beats(self._run.heartbeats, process_start_unix_s())}
        silent = [rank for rank, beat in beats.items() if time.time() - beat.unix_time_s > limit_s / 2]
        self._wake([beats[rank] for rank in silent])
        # Until nobody writes any more: a launcher kills the others once this rank has ended.
        began_s = time.monotonic()
        sizes: list[int] = []
        while not all(sizes) or sizes != self._stack_sizes():
            if time.monotonic() - began_s > _STACKS_WITHIN_S:
                break
            sizes = self._stack_sizes()
            time.sleep(self._poll_s)
        error = hang_error(beats, silent, self._world.num_ranks, limit_s, str(self._run.stacks))
        os._exit(report_failure(self._run, self._world.rank, error, self._mark.step))

    def _wake(self, silent: Sequence[Beat]) -> None:
        """Has the stacks written of processes on this machine whose own watchdog does not run.

        One that a signal stopped goes on, and its watchdog writes them. Only where that does not, since something holds
        Python's lock for ever, does a handler in C: it walks the frames of all threads, and those of a thread that runs
        meanwhile may be freed memory, of which processes that were merely stopped died now and then.
        """
        here = [beat for beat in silent if beat.host == socket.gethostname()]
        _signal(here, signal.SIGCONT)
        deadline_s = time.monotonic() + _POLLS_TO_WAKE * self._poll_s
        while (still := [beat for beat in here if not self._stack_size(beat.rank)]) and time.monotonic() < deadline_s:
            time.sleep(_POLL_RANGE_S[0])
        _signal(still, STACK_SIGNAL)

    def _may_name_the_late(self) -> bool:
        """Asks for all stacks, unless another rank has. It looks at every rank, which is for one of them to do."""
        with suppress(OSError):
            try:
                self._run.stacks_wanted.open("x").close()
            except FileExistsError:
                asked_unix_s = self._run.stacks_wanted.stat().st_mtime
                if process_start_unix_s() <= asked_unix_s and time.time() - asked_unix_s < _NAMES_WITHIN_S:
                    return False
                self._run.stacks_wanted.touch()
        return True

    def _stack_sizes(self) -> list[int]:
        return [self._stack_size(rank) for rank in range(self._world.num_ranks)]

    def _stack_size(self, rank: int) -> int:
        with suppress(OSError):
            return (self._run.stacks / f"rank_{rank}.txt").stat().st_size
        return 0


def hang_error(
    beats: Mapping[int, Beat], silent: Sequence[int], num_ranks: int, limit_s: float, stacks: str
) -> HangError:
    """Which ranks the others wait for.

    Args:
        beats: The last of every rank that has one.
        silent: Ranks whose process no longer writes them.
        num_ranks: Ranks in all.
        limit_s: The limit that passed.
        stacks: Folder of the stacks, as the user would name it.
    """
    late = late_ranks(beats, silent, num_ranks)
    named = [_where(rank, beats.get(rank), rank in silent) for rank in (late or range(num_ranks))]
    more = f" and {len(named) - _RANKS_NAMED} more" if len(named) > _RANKS_NAMED else ""
    where = "; ".join(named[:_RANKS_NAMED]) + more
    plural = "ranks" if len(late) > 1 else "rank"
    who = f"{plural} {', '.join(map(str, late))} did not arrive" if late else "no rank is behind the others"
    error = HangError(
        f"nothing went on for {_duration(limit_s)}: {who} ({where})",
        fix=f"see the stacks of all ranks in {stacks}, and continue with --resume; raise train.hang_minutes or "
        "train.slow_hang_minutes if this was no hang",
    )
    error.late_ranks = tuple(late)
    return error


def _where(rank: int, beat: Beat | None, is_silent: bool) -> str:
    if beat is None:
        return f"rank {rank} never started"
    seen = "which does not run, last seen " if is_silent else ""
    return f"rank {rank}, process {beat.pid} on {beat.host}, {seen}{beat.phase} after step {beat.step}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"


def _signal(beats: Sequence[Beat], number: int) -> None:
    for beat in beats:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(beat.pid, number)
