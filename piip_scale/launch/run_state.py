"""The state of a run in one word, and what happened last: by the queue, the run's own status, and their age."""

from __future__ import annotations

from typing import TYPE_CHECKING

from piip_scale.launch.signs import SILENT_S, pause, standstill
from piip_scale.launch.submitting import submitted_jobs
from piip_scale.launch.words import duration

if TYPE_CHECKING:
    from piip_scale.launch.attempts import Attempt
    from piip_scale.launch.runs import Run

LOST = "lost"
"""Its status is that it runs, and it has neither job nor process."""

# What Slurm calls the ends of jobs, as a state of a run whose supervisor and guard were killed with it.
_SLURM_ENDS = {
    "CANCELLED": "cancelled",
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "OUT_OF_MEMORY": "out-of-memory",
    "NODE_FAIL": "node-lost",
    "BOOT_FAIL": "node-lost",
    "PREEMPTED": "preempted",
    "REVOKED": "cancelled",
    "FAILED": "failed",
}
_GOES_ON = "it goes on with piip-scale jobs requeue, or --resume"
_HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
# A job that was submitted a moment ago need not be in a queue that was read before.
_QUEUED_WITHIN_S = 60.0
_OUT_OF_QUEUE = "left the queue before it began: cancelled, or its deadline passed; piip-scale jobs requeue submits it"


def state_of(run: Run, alive: bool, now_unix_s: float) -> str:
    """A run's state in one word.

    The queue knows best whether something runs; then what the last attempt's supervisor decided; the run's own status
    counts where it is younger, as of a training by hand, or alone.

    Returns:
        ``queued``, ``held``; ``running``, ``stalled`` (nothing goes on), ``stopping`` (asked to), ``waiting`` (before
        another attempt); ``done``, ``stopped``, ``cancelled``, ``given-up``, ``failed``; ``lost``: its status is that
        it runs, it has neither job nor process, and Slurm has forgotten its end, or else ``timeout``,
        ``out-of-memory``, ``node-lost``, ``preempted``; ``submitted``, ``empty``, ``unreadable``; or the
        queue's own name of it.
    """
    if run.problem:
        return "unreadable"
    reported = run.status.state if run.status else None
    if run.job is not None and reported != "done":
        if run.job.is_waiting:
            return "held" if is_held(run) else "queued"
        return _state_of_begun(run, now_unix_s) if run.job.state == "RUNNING" else run.job.state.lower()
    if reported == "running" and alive:
        return "stalled" if standstill(run, now_unix_s) else "running"
    state = _state_at_rest(run, now_unix_s)
    return _SLURM_ENDS.get(run.slurm_end, state) if state == LOST else state


def is_held(run: Run) -> bool:
    """Whether a person has to release its job."""
    return run.job is not None and ("Held" in run.job.reason or run.job.state in _HELD)


def _state_of_begun(run: Run, now_unix_s: float) -> str:
    last = run.attempts[-1] if run.attempts else None
    if last is not None and last.end is not None:
        return _state_decided(run, last) if last.decision in ("finish", "give_up") else "waiting"
    if run.request is not None and last is not None and run.request.unix_time_s > last.started_unix_s:
        return "stopping"
    return "stalled" if standstill(run, now_unix_s) else "running"


def _state_at_rest(run: Run, now_unix_s: float) -> str:
    """Of a run that no job and no process has."""
    reported, last = run.status.state if run.status else None, run.attempts[-1] if run.attempts else None
    if last is not None and last.end is not None and last.decision and not _spoke_after(run, last):
        return _state_decided(run, last)
    is_older = last is not None and last.end is None and run.status_unix_s < last.started_unix_s
    if reported == "running" or (reported not in (None, "done") and is_older):
        return LOST
    if reported is None and last is not None:
        return str(last.end) if last.end in ("stopped", "done") else "failed" if last.end else LOST
    return reported or _state_unbegun(run, now_unix_s)


def _spoke_after(run: Run, last: Attempt) -> bool:
    """Whether a later training, which no supervisor started, has left a status."""
    ended_s = last.ended_unix_s
    return run.status is not None and ended_s is not None and run.status_unix_s > ended_s + SILENT_S


def _state_decided(run: Run, last: Attempt) -> str:
    if last.end == "done":
        return "done"
    if last.decision == "finish":
        return "cancelled" if last.ending.cause == "cancel" else "stopped"
    if last.decision == "give_up":
        return "given-up"
    if last.decision == "restart":
        return LOST
    if was_stopped_while_waiting(run):
        return "stopped"
    return "cancelled" if run.queue_known else "waiting"


def was_stopped_while_waiting(run: Run) -> bool:
    """Whether somebody took its job out of the queue by ``jobs stop``."""
    last_s = (run.attempts[-1].ended_unix_s or 0.0) if run.attempts else 0.0
    return run.request is not None and run.request.action == "stop" and run.request.unix_time_s >= last_s


def _state_unbegun(run: Run, now_unix_s: float) -> str:
    if run.log is not None:
        return "failed"
    if run.spec is None:
        return "empty"
    if was_stopped_while_waiting(run):
        return "cancelled"
    is_old = run.submitted_unix_s is not None and now_unix_s - run.submitted_unix_s > _QUEUED_WITHIN_S
    return "cancelled" if is_old and run.queue_known and submitted_jobs(run.path) else "submitted"


def event_of(run: Run, state: str, now_unix_s: float) -> str:
    """What happened last, in one line."""
    if run.problem:
        return run.problem
    last = run.attempts[-1] if run.attempts else None
    outcome = (last.why or last.ending.line) if last else ""
    if run.job is not None and state in ("queued", "held"):
        return f"waits ({run.job.reason})" + (f" after: {outcome}" if outcome else "")
    if run.job is not None and not outcome and state == run.job.state.lower() != "running":
        return f"Slurm calls job {run.job.name} {state}"
    if state == "stalled":
        return standstill(run, now_unix_s)
    if state == "running":
        if run.is_stepping:
            return pause(run, now_unix_s) or run.pace.event
        return f"starting, attempt {last.attempt}" if last else "starting"
    if state == "stopping" and run.request is not None:
        asked = f"{run.request.action} was asked for" + f" by {run.request.user}" * bool(run.request.user)
        ago = f"{asked} {duration(max(now_unix_s - run.request.unix_time_s, 0.0))} ago"
        return "; ".join(filter(None, (ago, standstill(run, now_unix_s))))
    return _event_at_rest(run, state, outcome)


def _event_at_rest(run: Run, state: str, outcome: str) -> str:
    if run.slurm_end and state in (LOST, *_SLURM_ENDS.values()):
        return f"Slurm ended its job ({run.slurm_end.lower().replace('_', ' ')}); {_GOES_ON}"
    if state == LOST:
        return f"ended without a report; {_GOES_ON}"
    if state in ("stopped", "cancelled") and was_stopped_while_waiting(run) and run.request is not None:
        return "taken out of the queue" + f" by {run.request.user}" * bool(run.request.user)
    if state == "cancelled" and (not run.attempts or run.attempts[-1].decision == "requeue"):
        return _OUT_OF_QUEUE
    if state in ("given-up", "cancelled") and outcome:
        return outcome
    if run.status is not None and run.status.line and state in ("failed", "stopped"):
        return run.status.line
    if run.status is None and not outcome:
        return "ended before it began to train: see jobs logs" if run.log else "was submitted, has not started"
    return outcome or run.pace.event
