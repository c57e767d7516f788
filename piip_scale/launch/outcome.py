"""What became of an attempt: judged from what its ranks, srun and Slurm left behind, exit codes last."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from piip_scale.launch.attempts import Attempt
from piip_scale.launch.decide import INCURABLE
from piip_scale.launch.step_notes import StepNotes, TaskEnd
from piip_scale.run.run_dir import FirstError, Status


@dataclass(frozen=True)
class Evidence:
    """What is known after an attempt.

    Attributes:
        exit_code: Of srun, or of the process that started the ranks.
        last_step: Step of the newest valid checkpoint.
        status: What the run says of itself, if it said so in this attempt.
        first_error: What the first failing rank told.
        notes: What srun said.
        lost_nodes: Nodes of the attempt that are no longer there, each with a line of why.
        silence: Set where no rank gave a sign for too long, and they were ended from outside.
        cause: Why the ranks were asked to stop.
    """

    exit_code: int
    last_step: int
    status: Status | None = None
    first_error: FirstError | None = None
    notes: StepNotes = field(default_factory=StepNotes)
    lost_nodes: tuple[tuple[str, str], ...] = ()
    silence: str = ""
    cause: str = ""


def judge(attempt: Attempt, evidence: Evidence, ranks_per_node: int, ended_unix_s: float) -> Attempt:
    """The attempt with its end.

    Args:
        attempt: As it began.
        evidence: What is known.
        ranks_per_node: Ranks on each of its nodes, in order.
        ended_unix_s: When it ended.
    """
    ended = replace(attempt, ended_unix_s=ended_unix_s, last_step=evidence.last_step, cause=evidence.cause)
    state = evidence.status.state if evidence.status else ""
    if state in ("done", "stopped"):
        return replace(ended, end=state)
    return _failed(ended, evidence, ranks_per_node)


def _failed(ended: Attempt, evidence: Evidence, ranks_per_node: int) -> Attempt:
    first, notes = evidence.first_error, evidence.notes
    if first and first.reason in INCURABLE:
        return _told(ended, first)
    if evidence.lost_nodes:
        node, line = evidence.lost_nodes[0]
        step = first.step if first else 0
        return replace(ended, end="lost_node", node=node, error_step=step, error_kind="lost node", error_line=line)
    if evidence.silence:
        return replace(ended, end="hang", error_kind="hang", error_line=evidence.silence)
    killed = notes.first_end if notes.first_end and notes.first_end.by_signal else None
    # Ranks whose peer is gone only know that they lost contact.
    if killed and (first is None or first.reason == "communication"):
        return _lost(ended, killed, first.step if first else 0)
    if first:
        return _late(_told(ended, first), first.late_rank, ranks_per_node)
    return _silent(ended, notes, evidence.exit_code)


def _told(ended: Attempt, first: FirstError) -> Attempt:
    end = replace(ended, end="hang" if first.reason == "hang" else "crashed", error_kind=first.reason)
    return replace(end, error_line=first.line, error_step=first.step, rank=first.rank, node=first.node)


def _late(ended: Attempt, rank: int | None, ranks_per_node: int) -> Attempt:
    """A hang is told by a rank that waited; the one it waited for is what matters."""
    if ended.end != "hang":
        return ended
    node = ended.nodes[rank // ranks_per_node] if rank is not None and rank // ranks_per_node < len(ended.nodes) else ""
    return replace(ended, rank=rank, node=node)


def _lost(ended: Attempt, end: TaskEnd, step: int) -> Attempt:
    line = f"rank {end.rank} on {end.node} ended by a signal ({end.how}) before it could say why"
    ended = replace(ended, end="crashed", error_kind="lost rank", error_line=line, error_step=step)
    return replace(ended, rank=end.rank, node=end.node)


def _silent(ended: Attempt, notes: StepNotes, exit_code: int) -> Attempt:
    ended = replace(ended, end="crashed")
    if notes.refusal:
        return replace(ended, error_kind="launch", error_line=f"the ranks did not start: {notes.refusal}")
    if notes.first_end:
        first = notes.first_end
        line = f"rank {first.rank} on {first.node} ended without a word ({first.how})"
        return replace(ended, error_kind="lost rank", error_line=line, rank=first.rank, node=first.node)
    line = f"the ranks ended without a word (exit code {exit_code}) before the training was done"
    return replace(ended, error_kind="lost rank", error_line=line)
