"""Where a rank is: marked by its training, read by its watchdog and by other ranks'."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from piip_scale.files import write_briefly

WAITING, COMPUTING = "waiting for data", "computing"
_OF_A_STEP = (WAITING, COMPUTING)
# Has a rank write its stack. None that Slurm, NCCL or a launcher sends.
STACK_SIGNAL = signal.SIGRTMIN + 7


@dataclass(frozen=True)
class Mark:
    """A point in the run that a rank reached.

    Attributes:
        number: Marks before it; ranks pass the same marks in the same order.
        phase: What the rank does from here on.
        step: Optimiser steps behind it.
        limit_s: How long it may take until the next mark.
    """

    number: int
    phase: str
    step: int
    limit_s: float


class Heartbeat:
    """Keeps the last mark; any thread may read it.

    Args:
        step_limit_s: Longest a rank may wait or compute in a step without another mark.
        slow_limit_s: Likewise for everything else: the start, the first step, evaluations and checkpoints.
    """

    def __init__(self, step_limit_s: float = math.inf, slow_limit_s: float = math.inf) -> None:
        self.step_limit_s, self._slow_limit_s = step_limit_s, slow_limit_s
        self._first_step: int | None = None
        self.last = Mark(0, "starting", 0, slow_limit_s)

    @property
    def shortest_limit_s(self) -> float:
        """The shorter of the two limits."""
        return min(self.step_limit_s, self._slow_limit_s)

    def mark(self, phase: str, step: int) -> None:
        """This rank begins a phase, or goes on in it."""
        if phase in _OF_A_STEP and self._first_step is None:
            self._first_step = step
        # The first step of a process starts loaders and compiles kernels.
        steady = phase in _OF_A_STEP and step != self._first_step
        limit_s = self.step_limit_s if steady else self._slow_limit_s
        self.last = Mark(self.last.number + 1, phase, step, limit_s)

    def again(self) -> None:
        """The phase goes on and has made progress."""
        self.mark(self.last.phase, self.last.step)


@dataclass(frozen=True)
class Beat:
    """A rank's mark as other processes see it.

    Attributes:
        rank: The rank.
        number: As in ``Mark``.
        collectives: Messages among ranks that it has begun.
        phase: As in ``Mark``.
        step: As in ``Mark``.
        waiting_s: How long it has been there.
        unix_time_s: When this was written: it goes on while the rank waits, but not when its process is stopped.
        host: Name of its machine.
        pid: Its process.
        limit_s: As in ``Mark``.
        started_unix_s: When its process began.
    """

    rank: int
    number: int
    collectives: int
    phase: str
    step: int
    waiting_s: float
    unix_time_s: float
    host: str
    pid: int
    limit_s: float = math.inf
    started_unix_s: float = 0.0


def write_beat(folder: Path, beat: Beat) -> None:
    """Replaces a rank's own file. A disk that refuses is not this function's to report."""
    write_briefly(folder / f"rank_{beat.rank}.json", json.dumps(asdict(beat)))


def write_node(folder: Path, node_rank: int, beats: Sequence[Beat]) -> None:
    """Replaces the file that holds the beats of a node's ranks. As ``write_beat``, it reports nothing."""
    write_briefly(folder / f"node_{node_rank}.json", json.dumps({"beats": [asdict(beat) for beat in beats]}))


def late_ranks(beats: Mapping[int, Beat], silent: Sequence[int], num_ranks: int) -> list[int]:
    """Ranks that the others wait for: behind the foremost, without a sign, or never there.

    Args:
        beats: The last of every rank that has one.
        silent: Ranks whose process no longer writes them.
        num_ranks: Ranks in all.
    """
    positions = {rank: (beat.number, beat.collectives) for rank, beat in beats.items()}
    foremost = max(positions.values(), default=(0, 0))
    return [rank for rank in range(num_ranks) if positions.get(rank, (-1, -1)) < foremost or rank in silent]


def read_beats(folder: Path, since_unix_s: float) -> Iterator[Beat]:
    """Each rank's last beat, of those that were written since a time; unreadable ones are as good as none."""
    files = [*folder.glob("node_*.json"), *folder.glob("rank_*.json")]
    beats = (beat for file in files for beat in _read(file))
    yield from _newest(beat for beat in beats if beat.unix_time_s >= since_unix_s).values()


def read_beat(folder: Path, rank: int, node_rank: int = 0) -> Beat | None:
    """A rank's last beat; ``None`` where there is none.

    Args:
        folder: Of the heartbeats.
        rank: The rank.
        node_rank: Its node: rank 0 is on the first.
    """
    beats = [*_read(folder / f"node_{node_rank}.json"), *_read(folder / f"rank_{rank}.json")]
    return _newest(beats).get(rank)


def read_node(folder: Path, node_rank: int) -> list[Beat]:
    """The beats in a node's file; none where there is no such file."""
    return _read(folder / f"node_{node_rank}.json")


def _newest(beats: Iterable[Beat]) -> dict[int, Beat]:
    newest: dict[int, Beat] = {}
    for beat in beats:
        if beat.rank not in newest or beat.unix_time_s > newest[beat.rank].unix_time_s:
            newest[beat.rank] = beat
    return newest


def _read(path: Path) -> list[Beat]:
    """The beats of a file: a node's, or one rank's own, as all ranks wrote before there were nodes' files."""
    with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        values = json.loads(path.read_text(encoding="utf-8"))
        beats = [Beat(**one) for one in values.get("beats", [values])]
        return [beat for beat in beats if _has_types(beat)]
    return []


def _has_types(beat: Beat) -> bool:
    return all(_has_type(getattr(beat, field.name), field.type) for field in fields(Beat))


def _has_type(value: object, type_name: object) -> bool:
    wanted = {"int": (int,), "float": (int, float), "str": (str,)}[str(type_name)]
    return type(value) in wanted
