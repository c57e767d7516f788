"""What became of an attempt: judged from what its ranks, srun and Slurm left behind, exit codes last."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from piip_scale.errors import PiipError
from piip_scale.launch.attempts import Attempt, End
from piip_scale.launch.decide import INCURABLE
from piip_scale.launch.step_notes import StepNotes, TaskEnd
from piip_scale.run.ending import Ending
from piip_scale.run.run_dir import Status

# What an error of ours exits with where a rank could write it nowhere, and a command line that cannot be read.
_TOO_MUCH = "its job took too much host memory; raise --mem or lower data.workers"
_REFUSED = f"exit code {PiipError.exit_code}"


@dataclass(frozen=True)
class Evidence:
    """What is known after an attempt.

    Attributes:
        exit_code: Of srun, or of the process that started the ranks.
        last_step: Step of the newest valid checkpoint.
        status: The run's own status, if it was written in this attempt.
        first_error: What the first failing rank left.
        notes: What srun reported.
        lost_nodes: Nodes of the attempt that are no longer there, each with a line of why.
        silence: Set where no rank gave a sign for too long, and they were ended from outside.
        late_save: Set where ranks that were asked to stop had not saved when the job's time was over.
        cause: Why the ranks were asked to stop.
        seen_step: Optimiser steps behind the foremost rank, by its last heartbeat.
    """

    exit_code: int
    last_step: int
    status: Status | None = None
    first_error: Ending | None = None
    notes: StepNotes = field(default_factory=StepNotes)
    lost_nodes: tuple[tuple[str, str], ...] = ()
    silence: str = ""
    late_save: str = ""
    cause: str = ""
    seen_step: int = 0


def judge(attempt: Attempt, evidence: Evidence, ranks_per_node: int, ended_unix_s: float) -> Attempt:
    """The attempt with its end.

    Args:
        attempt: As it began.
        evidence: What is known.
        ranks_per_node: Ranks on each of its nodes, in order.
        ended_unix_s: When it ended.
    """
    ended = replace(attempt, ended_unix_s=ended_unix_s, last_step=evidence.last_step)
    state = evidence.status.state if evidence.status else ""
    if state in ("done", "stopped"):
        left = (evidence.status and evidence.status.ending) or Ending(step=evidence.last_step)
        # What a rank that was asked to stop left is no failure.
        return replace(ended, end=state, ending=replace(left, reason="", cause=evidence.cause))
    end, ending = _failure(attempt, evidence, ranks_per_node)
    when_s = ending.unix_time_s or ended_unix_s
    return replace(ended, end=end, ending=replace(ending, cause=evidence.cause, unix_time_s=when_s))


def _failure(attempt: Attempt, evidence: Evidence, ranks_per_node: int) -> tuple[End, Ending]:
    first, notes = evidence.first_error, evidence.notes
    blank = Ending(step=first.step if first else evidence.seen_step, exit_code=evidence.exit_code)
    if first and first.reason in INCURABLE:
        return "crashed", first
    if evidence.lost_nodes:
        node, line = evidence.lost_nodes[0]
        return "lost_node", blank.failed("lost node", line, node=node)
    if evidence.silence:
        return "hang", blank.failed("hang", evidence.silence)
    if evidence.late_save and (first is None or first.reason == "communication"):
        return "crashed", blank.failed("late save", evidence.late_save)
    if notes.first_end and notes.first_end.is_out_of_memory:
        return "crashed", _out_of_memory(blank, notes.first_end)
    killed = notes.first_end if notes.first_end and notes.first_end.by_signal else None
    # Ranks whose peer is gone only know that they lost contact.
    if killed and (first is None or first.reason == "communication"):
        line = f"rank {killed.rank} on {killed.node} ended by a signal ({killed.how}) before it could report why"
        return "crashed", blank.failed("lost rank", line, rank=killed.rank, node=killed.node)
    if first:
        return ("hang", _of_late_rank(first, attempt, ranks_per_node)) if first.reason == "hang" else ("crashed", first)
    return "crashed", _silent(blank, notes)


def _of_late_rank(first: Ending, attempt: Attempt, ranks_per_node: int) -> Ending:
    """A hang is reported by a rank that waited; the one it waited for is what matters."""
    rank = first.late_rank
    index = len(attempt.nodes) if rank is None else rank // ranks_per_node
    return replace(first, rank=rank, node=attempt.nodes[index] if index < len(attempt.nodes) else "")


def _out_of_memory(blank: Ending, end: TaskEnd) -> Ending:
    # Not "lost rank": it is the run that needs so much, and its node is as good as any.
    line = f"rank {end.rank} on {end.node} was killed ({end.how}): {_TOO_MUCH}"
    return blank.failed("out of host memory", line, rank=end.rank, node=end.node)


def _silent(blank: Ending, notes: StepNotes) -> Ending:
    if notes.refusal:
        reason = "bad config" if notes.is_final else "launch"
        return blank.failed(reason, f"the ranks did not start: {notes.refusal}")
    if notes.first_end:
        first = notes.first_end
        who, is_refusal = f"rank {first.rank} on {first.node}", first.how.endswith(_REFUSED)
        line = f"{who} refused to start, for the reason in the log" if is_refusal else f"{who} ended without a report"
        reason = PiipError.reason if is_refusal else "lost rank"
        return blank.failed(reason, f"{line} ({first.how})", rank=first.rank, node=first.node)
    if notes.is_out_of_memory:
        line = f"a rank was killed (exit code {blank.exit_code}): {_TOO_MUCH}"
        return blank.failed("out of host memory", line)
    line = f"the ranks ended without a report (exit code {blank.exit_code}) before the training was done"
    return blank.failed("lost rank", line)
