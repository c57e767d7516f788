"""Attempts whose end nobody saw, since their supervisor was ended too: what a later start makes of them."""

from __future__ import annotations

import time
from dataclasses import replace

from piip_scale.checkpoint.store import CheckpointStore, read_step
from piip_scale.launch.attempts import Attempt
from piip_scale.launch.executors import Executor
from piip_scale.launch.outcome import Evidence, judge
from piip_scale.run.heartbeat import read_beats
from piip_scale.run.run_dir import RunDirectory

ENDED_TOGETHER = "its supervisor was ended with it: the job was requeued or killed, or its first node was lost"
# Of ranks that live, heartbeats are written every twenty seconds; Slurm kills what it ends within 30.
_BEATS_WITHIN_S, _RANKS_WITHIN_S, _POLL_S = 25.0, 90.0, 5.0


def close_unfinished(
    last: Attempt, run: RunDirectory, executor: Executor, ranks_per_node: int, line: str = ENDED_TOGETHER
) -> Attempt:
    """The attempt with its end, from what it left.

    Args:
        last: The attempt.
        run: Its run.
        executor: Knows whether its nodes are still there.
        ranks_per_node: Ranks on each of them.
        line: What ended it, where nothing else is known.
    """
    gone = [node for node in last.nodes if node not in executor.allocated()]
    status = run.status()
    has_stopped = status is not None and status.state == "stopped"
    # Its own status, and not that of an attempt before.
    has_stopped = has_stopped and run.status_file.stat().st_mtime >= last.started_unix_s
    evidence = Evidence(
        exit_code=0,
        last_step=newest_step(run),
        status=status if has_stopped else None,
        lost_nodes=executor.down(gone),
        cause="requeue" if has_stopped else "",
    )
    ended = judge(last, evidence, ranks_per_node, time.time())
    if ended.end in ("stopped", "lost_node"):
        return ended
    return replace(ended, end="cut", ending=replace(ended.ending, reason="", line=line))


def wait_for_ranks(run: RunDirectory) -> None:
    """Waits for ranks that outlive their job: Slurm is still ending it, or lost sight of their node."""
    until_s = time.monotonic() + _RANKS_WITHIN_S
    while time.time() - _newest_beat_s(run) < _BEATS_WITHIN_S and time.monotonic() < until_s:
        time.sleep(_POLL_S)


def newest_step(run: RunDirectory) -> int:
    """Step of the newest valid checkpoint; 0 for none."""
    newest = CheckpointStore(run.checkpoints, keep=1).latest()
    return read_step(newest) if newest else 0


def _newest_beat_s(run: RunDirectory) -> float:
    return max((beat.unix_time_s for beat in read_beats(run.heartbeats, 0.0)), default=0.0)
