"""Which ranks a run that stands still waits for, in one phrase, by the last heartbeats of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from piip_scale.launch.words import duration
from piip_scale.run.heartbeat import Beat, late_ranks


@dataclass(frozen=True)
class Placement:
    """Where ranks were started, as far as that is known.

    Attributes:
        num_ranks: Ranks in all; 0 where only those are known that have a heartbeat.
        nodes: As the cluster calls them, in the order of their ranks; empty without a job.
        ranks_per_node: Of a job.
    """

    num_ranks: int = 0
    nodes: Sequence[str] = ()
    ranks_per_node: int = 1

    def node_of(self, rank: int, beat: Beat | None) -> str:
        """A rank's node; empty where nobody knows it."""
        index = rank // self.ranks_per_node
        return self.nodes[index] if index < len(self.nodes) else beat.host if beat else ""


def waits_for(beats: Mapping[int, Beat], placement: Placement, silent_s: float, now_unix_s: float) -> str:
    """Which ranks hold up all others; empty where none is behind, or no rank is left that could wait.

    Args:
        beats: The last of every rank that has one.
        placement: Of the ranks.
        silent_s: A rank whose heartbeat is older does not run any more.
        now_unix_s: When they were read.
    """
    num_ranks = max(placement.num_ranks, *(rank + 1 for rank in beats), 0)
    silent = [rank for rank, beat in beats.items() if now_unix_s - beat.unix_time_s > silent_s]
    behind = late_ranks(beats, silent, num_ranks)
    # Those that do not run have others fall behind, too.
    late = [rank for rank in behind if rank in silent or rank not in beats] or behind
    if not late or len(late) == num_ranks:
        return ""
    first = late[0]
    node = placement.node_of(first, beats.get(first))
    on_node = [rank for rank in range(num_ranks) if placement.node_of(rank, beats.get(rank)) == node]
    is_whole = len(on_node) > 1 and set(on_node) <= set(late)
    named = on_node if is_whole else [first]
    who = f"all {len(on_node)} ranks on {node}" if is_whole else f"rank {first}" + f" on {node}" * bool(node)
    more = f", and for {len(late) - len(named)} more" if len(late) > len(named) else ""
    return f"waits for {who}, {_where(beats.get(first), first in silent, now_unix_s)}{more}"


def _where(beat: Beat | None, is_silent: bool, now_unix_s: float) -> str:
    if beat is None:
        return "without any sign so far"
    silent_s = max(now_unix_s - beat.unix_time_s, 0.0)
    still = (
        f"silent for {duration(silent_s)}" if is_silent else f"{beat.phase} for {duration(beat.waiting_s + silent_s)}"
    )
    return f"after step {beat.step}, {still}"
