"""What follows the end of an attempt: a pure function of the history and of what there is to go on with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from piip_scale.launch.attempts import Action, Attempt
from piip_scale.launch.time_left import LATE_SAVE, TIME_LIMIT

Asked = Literal["", "stop", "requeue", "cancel"]

# Kinds of failures, as ``reason_of`` names them: what a restart cannot change, what it mostly cures, and the rest,
# which is tried once more and is a bug when it comes again at the same step.
INCURABLE = frozenset({"bad config", "bad data", "bad model", "bad world", "short time limit"})
CURABLE = frozenset({"lost rank", "hang", "communication", "input or output", "device failure", "launch", LATE_SAVE})
_SICK_AT_ONCE = frozenset({"device failure"})
_SICK_WHEN_AGAIN = frozenset({"lost rank", "hang", "launch"})
# Ends that are no sign of the run itself, however often they come.
_INNOCENT_CAUSES = frozenset({"preemption", "requeue"})
# Who had so long and saved nothing would not save in any number of attempts.
_HAD_TIME_S = 3600.0
_MAX_PAUSE_S = 300.0


@dataclass(frozen=True)
class Situation:
    """What a decision depends on beside the history.

    Attributes:
        num_nodes: Nodes that the training needs.
        usable_nodes: Nodes of the allocation on which it could start again now.
        bad_nodes: Nodes of the allocation that are lost or failed their preflight.
        max_stale_restarts: So many restarts in a row may bring no newer checkpoint.
        has_queue: Whether the job can go back into a queue, or have a successor.
        is_ending: The allocation is about to end: its time limit is near, or another job takes its nodes.
        asked: What the user asked for.
    """

    num_nodes: int
    usable_nodes: tuple[str, ...]
    bad_nodes: tuple[str, ...] = ()
    max_stale_restarts: int = 3
    has_queue: bool = True
    is_ending: bool = False
    asked: Asked = ""


@dataclass(frozen=True)
class Decision:
    """What follows.

    Attributes:
        action: ``finish``: well or as asked, for good; ``requeue``: wait in the queue and go on; ``restart``: go on in
            this allocation; ``give_up``: a person has to look.
        why: One line.
        exclude: Nodes that the next attempt must not use.
        pause_s: How long to wait before it.
    """

    action: Action
    why: str
    exclude: tuple[str, ...] = ()
    pause_s: float = 0.0


def decide(history: Sequence[Attempt], situation: Situation) -> Decision:
    """What follows the last attempt, which has ended.

    Args:
        history: All attempts, the oldest first. Those before the last ``finish`` or ``give_up`` no longer count:
            whoever submits a run again has seen to it.
        situation: What there is to go on with.
    """
    last, recent = history[-1], since_verdict(history)
    if last.end == "done":
        return Decision("finish", "the training is done")
    if situation.asked in ("stop", "cancel"):
        return Decision("finish", _as_asked(last, situation.asked))
    if verdict := _hopeless(recent, situation.max_stale_restarts):
        return Decision("give_up", verdict)
    return _go_on(last, recent, situation)


def since_verdict(history: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """The attempts after the last that ended the job for good; the last of all belongs to them in any case."""
    ends = [index for index, attempt in enumerate(history[:-1]) if attempt.decision in ("finish", "give_up")]
    return tuple(history[ends[-1] + 1 if ends else 0 :])


def was_ended_for_good(history: Sequence[Attempt], job_id: int, restart_count: int, *, stop_asked: bool) -> bool:
    """Whether somebody stopped or cancelled a job that a requeueing, as that of a whole array, brings back.

    Args:
        history: All attempts.
        job_id: The job that starts.
        restart_count: How often it was requeued.
        stop_asked: The last that was asked of it, since it was submitted, is to stop.
    """
    last = history[-1] if history else None
    if last is None or last.job_id != job_id or last.restart_count >= restart_count:
        return False
    return stop_asked or (last.decision == "finish" and last.end != "done")


def num_stale(recent: Sequence[Attempt]) -> int:
    """How many attempts in a row, up to the last, left no newer checkpoint through no fault of others."""
    count = 0
    for attempt in reversed(recent):
        if _got_further(attempt):
            break
        is_innocent = attempt.ending.cause in _INNOCENT_CAUSES and attempt.seconds < _HAD_TIME_S
        count += not is_innocent
    return count


def _got_further(attempt: Attempt) -> bool:
    # A rank that is asked to stop as soon as it begins does one step: a run of those would never end.
    in_vain = attempt.ending.cause == TIME_LIMIT and attempt.last_step - attempt.first_step <= 1
    return attempt.has_progressed and (attempt.end == "done" or not in_vain)


def sick_nodes(recent: Sequence[Attempt]) -> tuple[str, ...]:
    """Nodes not to trust again: lost, or the place of a hardware failure, or twice where a rank hung or vanished."""
    counts: Counter[str] = Counter()
    for attempt in recent:
        # Not where ranks ended because the job had to.
        if attempt.ending.node and attempt.failed and not attempt.ending.cause:
            at_once = attempt.end == "lost_node" or attempt.ending.reason in _SICK_AT_ONCE
            counts[attempt.ending.node] += 2 if at_once else attempt.ending.reason in _SICK_WHEN_AGAIN
    return tuple(sorted(node for node, count in counts.items() if count > 1))


def is_same_failure(one: Attempt, other: Attempt) -> bool:
    """Whether two attempts failed at the same step with the same exception, numbers in its text aside."""
    first, second = (re.sub(r"0x[0-9a-fA-F]+|\d+", "#", attempt.ending.line) for attempt in (one, other))
    return one.failed and other.failed and one.ending.step == other.ending.step and first == second


def _hopeless(recent: Sequence[Attempt], max_stale: int) -> str:
    """Why no restart would help; empty where one may."""
    last = recent[-1]
    if last.failed and last.ending.reason in INCURABLE:
        return f"{last.ending.reason}, which a restart cannot cure: {last.ending.line}"
    # A failure without a kind is of what surrounds the training: nodes, the supervisor.
    is_unknown = last.end == "crashed" and last.ending.reason not in CURABLE
    if is_unknown and any(is_same_failure(last, earlier) for earlier in recent[:-1]):
        return f"the same failure twice after step {last.ending.step}, so no accident: {last.ending.line}"
    stale = num_stale(recent)
    if stale > max_stale:
        if last.ending.cause == TIME_LIMIT:
            return (
                f"{stale} attempts in a row ended by the time limit and got no further than step {last.last_step}; "
                "raise --time, or the partition's limit, or save more often (train.checkpoint_every_steps)"
            )
        what = (last.ending.line if last.failed else "") or last.why or f"it was {last.end}"
        return f"{stale} attempts in a row brought no newer checkpoint than step {last.last_step}; the last: {what}"
    return ""


def _go_on(last: Attempt, recent: Sequence[Attempt], situation: Situation) -> Decision:
    sick = sick_nodes(recent)
    exclude = tuple(sorted({*sick, *situation.bad_nodes}))
    usable = [node for node in situation.usable_nodes if node not in exclude]
    why = _reason(last)
    may_restart = last.failed and not situation.is_ending and situation.asked != "requeue"
    if may_restart and len(usable) >= situation.num_nodes:
        return Decision("restart", why, exclude, _pause_s(recent))
    if situation.has_queue:
        return Decision("requeue", why, exclude)
    if last.end == "stopped":
        return Decision("finish", f"{why}; the same command goes on from there")
    missing = f"{situation.num_nodes} nodes are needed, {len(usable)} can be used"
    return Decision("give_up", f"{why}; {missing}")


def _pause_s(recent: Sequence[Attempt]) -> float:
    """None at first; a disk or a network that is down needs some minutes."""
    stale = num_stale(recent)
    slow = recent[-1].ending.reason in ("input or output", "communication", "launch")
    return min(30.0 * 2.0**stale, _MAX_PAUSE_S) if slow and stale > 1 else 0.0


def _as_asked(last: Attempt, asked: Asked) -> str:
    who = "cancelled by scancel" if asked == "cancel" else "ended as asked"
    how = "saved" if last.end == "stopped" else f"the last checkpoint is that of step {last.last_step}"
    return f"{who}; {how}" + (f"; on the way: {last.ending.line}" if last.failed and last.ending.line else "")


def _reason(last: Attempt) -> str:
    if last.end == "stopped":
        cause = last.ending.cause or "a signal"
        return f"stopped by {cause}, saved at step {last.last_step}"
    went_on = f"goes on from step {last.last_step}" if last.last_step else "starts again from the beginning"
    kind = (last.ending.reason or last.end or "").replace("_", " ")
    return f"{kind}: {last.ending.line or 'it ended without a report'}; {went_on}"
