"""How the ranks of a node show where they are in one file: they hand it to the node's first, which writes for all.

On a disk that thousands of ranks share, a file a rank and beat is thousands of operations a second. So each rank puts
its beat into the node's own memory, and the first of the node writes them all, and looks there for all what others
left: an error, a request for stacks, a later process in their place. A rank whose beats are not passed on, since the
first died or stands still or each has a container of its own, writes and looks for itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from piip_scale.errors import PiipError, RunError
from piip_scale.files import private_folder, temporary_folder, write_briefly
from piip_scale.run.ending import Ending, parse_ending
from piip_scale.run.heartbeat import Beat, read_beat, read_beats, read_node, write_beat, write_node
from piip_scale.run.run_dir import RunDirectory, process_start_unix_s
from piip_scale.world import World

# Of what goes on all the time, and of what stands still.
_CHANGED_EVERY_S, _EVERY_S = 10.0, 20.0
# Whoever looks for late or silent ranks after a limit must find where they were long before it.
_WRITES_PER_LIMIT = 5
# So many beats a rank waits to have its own passed on.
_PATIENCE_POLLS = 5
_SHARED_MEMORY = Path("/dev/shm")
_LEFT_BEHIND_S = 86400.0


@dataclass(frozen=True)
class News:
    """What a rank's process must know of others.

    Attributes:
        ending: How the rank ended that failed first; ``None`` while none has.
        stacks_unix_s: When stacks were last asked for; 0 for never.
        later: The beat of a process that has the place of one of this node; ``None`` where there is none.
        seen: Of each rank that a node's first writes for, when the beat was written that it has of it.
    """

    ending: Ending | None = None
    stacks_unix_s: float = 0.0
    later: Beat | None = None
    seen: dict[int, float] = field(default_factory=dict)


class NodeBeats:
    """A rank's part in its node's file; not for two threads at once.

    Args:
        run: The run's directory.
        world: The ranks.
        poll_s: How often ``exchange`` is called.
        limit_s: Shortest time after which standing still counts as a hang.
    """

    def __init__(self, run: RunDirectory, world: World, poll_s: float, limit_s: float = math.inf) -> None:
        self._run, self._world = run, world
        self._changed_every_s = min(_CHANGED_EVERY_S, limit_s / _WRITES_PER_LIMIT)
        self._every_s = min(_EVERY_S, limit_s / _WRITES_PER_LIMIT)
        self._patience_s = _PATIENCE_POLLS * poll_s
        self._passed_on_s = time.time()
        # Of every rank that was ever seen: one that ended, or was killed, stays where it was last.
        self._beats: dict[int, Beat] = {}
        self._written: dict[int, Beat] = {}
        self._written_s = -math.inf
        self._folder = _folder_of(run, world) if world.ranks_per_node > 1 else None

    def exchange(self, own: Beat) -> News:
        """Shows this rank's beat to the others, and says what they left for it; never raises for a disk's sake."""
        if self._folder:
            write_beat(self._folder, own)
        if self._world.local_rank == 0:
            return self._lead(own)
        news = self._news_of_first()
        if news:
            self._passed_on_s = max(news.seen.get(own.rank, 0.0), self._passed_on_s)
        if own.unix_time_s - self._passed_on_s <= self._patience_s:
            return news or News()
        return self._alone(own)

    def close(self, own: Beat) -> None:
        """Shows the last beat, and takes from the node's memory what is this rank's."""
        if self._folder:
            write_beat(self._folder, own)
        if self._world.local_rank == 0:
            self._gather(own)
            write_node(self._run.heartbeats, self._world.node_rank, [*self._beats.values()])
        if self._folder:
            names = ["news.json"] * (self._world.local_rank == 0) + [f"rank_{own.rank}.json"]
            with suppress(OSError):
                for name in names:
                    (self._folder / name).unlink(missing_ok=True)
                # The last of the node's ranks finds it empty.
                self._folder.rmdir()

    def _lead(self, own: Beat) -> News:
        self._gather(own)
        later = None
        if self._is_due():
            later = self._later(read_node(self._run.heartbeats, self._world.node_rank), own)
            write_node(self._run.heartbeats, self._world.node_rank, [*self._beats.values()])
        news = News(*self._left_for_all(), later, {rank: beat.unix_time_s for rank, beat in self._beats.items()})
        if self._folder:
            write_briefly(self._folder / "news.json", json.dumps(asdict(news)))
        return news

    def _alone(self, own: Beat) -> News:
        self._beats, later = {own.rank: own}, None
        if self._is_due():
            found = read_beat(self._run.heartbeats, own.rank, self._world.node_rank)
            later = self._later([found] if found else [], own)
            write_beat(self._run.heartbeats, own)
        return News(*self._left_for_all(), later)

    def _gather(self, own: Beat) -> None:
        if self._folder:
            self._beats |= {beat.rank: beat for beat in read_beats(self._folder, process_start_unix_s())}
        self._beats[own.rank] = own

    def _is_due(self) -> bool:
        """Whether the beats are to be written; where they are, they count as written from here on."""
        waited_s = time.monotonic() - self._written_s
        is_new = _processes(self._beats) != _processes(self._written)
        has_moved = _numbers(self._beats) != _numbers(self._written)
        if is_new or waited_s >= (self._changed_every_s if has_moved else self._every_s):
            self._written, self._written_s = dict(self._beats), time.monotonic()
            return True
        return False

    def _later(self, found: Sequence[Beat], own: Beat) -> Beat | None:
        """A beat of a process that is none of this launch's and began after this one."""
        known = set(_processes(self._beats).values())
        others = (beat for beat in found if (beat.host, beat.pid) not in known)
        return next((beat for beat in others if beat.started_unix_s > own.started_unix_s), None)

    def _left_for_all(self) -> tuple[Ending | None, float]:
        asked_unix_s = 0.0
        with suppress(OSError):
            asked_unix_s = self._run.stacks_wanted.stat().st_mtime
        return self._run.first_error(), asked_unix_s

    def _news_of_first(self) -> News | None:
        if self._folder is None:
            return None
        with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            values = json.loads((self._folder / "news.json").read_text(encoding="utf-8"))
            ending = parse_ending(values["ending"]) if values["ending"] else None
            later = values["later"]
            return News(
                # A first rank of an earlier launch may have been killed before it could take its news away.
                ending=ending if ending and ending.unix_time_s >= process_start_unix_s() else None,
                stacks_unix_s=float(values["stacks_unix_s"]),
                later=Beat(**later) if later else None,
                seen={int(rank): float(unix_s) for rank, unix_s in values["seen"].items()},
            )
        return None


def _processes(beats: Mapping[int, Beat]) -> dict[int, tuple[str, int]]:
    return {rank: (beat.host, beat.pid) for rank, beat in beats.items()}


def _numbers(beats: Mapping[int, Beat]) -> dict[int, int]:
    return {rank: beat.number for rank, beat in beats.items()}


def _folder_of(run: RunDirectory, world: World) -> Path | None:
    """Where this launch's ranks of this node meet; ``None`` where they have no place.

    Two nodes may be one machine, and a machine may hold ranks of several launches.
    """
    launch = f"{os.path.abspath(run.path)} {world.master_address}:{world.master_port} {world.node_rank}"
    with suppress(PiipError, OSError):
        base = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else temporary_folder()
        all_launches = private_folder(base / f"piip_scale_beats_{os.getuid()}", RunError, fix="remove the folder")
        if world.local_rank == 0:
            _forget_killed(all_launches)
        folder = all_launches / hashlib.blake2b(launch.encode(), digest_size=8).hexdigest()
        folder.mkdir(exist_ok=True)
        return folder
    return None


def _forget_killed(all_launches: Path) -> None:
    """Removes what ranks left that were killed: nobody writes there any more."""
    for folder in all_launches.iterdir():
        if time.time() - folder.stat().st_mtime > _LEFT_BEHIND_S:
            shutil.rmtree(folder, ignore_errors=True)
