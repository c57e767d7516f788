"""How old the signs are that a run's state rests on: heartbeats, metrics, what was submitted, how it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from piip_scale.launch.late import Placement, waits_for
from piip_scale.launch.words import duration
from piip_scale.run.heartbeat import COMPUTING, WAITING, Beat

if TYPE_CHECKING:
    from piip_scale.launch.runs import Run

# A node writes its ranks' heartbeats every twenty seconds, also while they wait; disks and clocks may be late.
SILENT_S = 60.0
# So many times the usual step is no longer a slow one.
_STEPS_STILL = 10
# Without a heartbeat nobody knows whether it evaluates or saves, which writes no metrics.
_METRICS_SILENT_S = 600.0
_START_S = 3600.0
# An evaluation or a save of so long is worth a word.
_PAUSE_S = 10.0


def sign_age_s(run: Run, state: str, now_unix_s: float) -> float | None:
    """How long ago the last sign came that a run's state rests on; ``None`` where there is none.

    Of one that runs, the main rank's last mark or its last line of metrics, whichever is younger; of one in the queue
    its submission; of one between attempts, or at its end, that end.
    """
    if state in ("running", "stalled", "stopping"):
        return _age_of_newest(_moved_unix_s(run, now_unix_s), now_unix_s)
    ended_s = run.attempts[-1].ended_unix_s if run.attempts else None
    times = [run.status_unix_s or None, ended_s]
    if state in ("queued", "held", "submitted"):
        times.append(run.submitted_unix_s)
    return _age_of_newest(times, now_unix_s)


def _moved_unix_s(run: Run, now_unix_s: float) -> list[float | None]:
    beat = current_beat(run)
    return [
        beat.unix_time_s - beat.waiting_s if beat else None,
        run.pace.unix_time_s if run.pace.unix_time_s and run.is_stepping else None,
        run.attempts[-1].started_unix_s if run.attempts else None,
    ]


def _age_of_newest(times: list[float | None], now_unix_s: float) -> float | None:
    known = [time for time in times if time is not None]
    return max(now_unix_s - max(known), 0.0) if known else None


def current_beat(run: Run) -> Beat | None:
    """The main rank's last heartbeat; ``None`` where it is of an earlier attempt, or absent."""
    beat = run.beat
    is_old = beat is not None and run.attempts and beat.unix_time_s < run.attempts[-1].started_unix_s
    return None if is_old else beat


def standstill(run: Run, now_unix_s: float) -> str:
    """What a run that runs has stood still at, in one line; empty where it goes on, as far as is known.

    The ranks that all others wait for, where ``ranks`` tells them; else what the main rank does.
    """
    what = _standstill_of_main(run, now_unix_s)
    if not what or not run.ranks:
        return what
    nodes = run.attempts[-1].nodes if run.attempts else ()
    spec = run.spec
    placement = Placement(spec.num_ranks, nodes, spec.ranks_per_node) if spec else Placement()
    return waits_for({beat.rank: beat for beat in run.ranks}, placement, SILENT_S, now_unix_s) or what


def _standstill_of_main(run: Run, now_unix_s: float) -> str:
    beat = current_beat(run)
    if beat is None:
        return _silence(run, now_unix_s)
    if _is_overtaken(run, beat):
        silent_s, step = now_unix_s - run.pace.unix_time_s, run.pace.step
    else:
        silent_s, step = now_unix_s - beat.unix_time_s, beat.step
    if silent_s > SILENT_S:
        return f"no sign of rank {beat.rank} on {beat.host} for {duration(silent_s)}, after step {step}"
    still_s = beat.waiting_s + max(silent_s, 0.0)
    if still_s > _patience_s(run, beat) and step == beat.step:
        return f"{beat.phase} for {duration(still_s)}, after step {beat.step}"
    return ""


def _is_overtaken(run: Run, beat: Beat) -> bool:
    """Whether the run has written a later step since: heartbeats come every ten seconds at most."""
    return run.is_stepping and run.pace.step > beat.step and run.pace.unix_time_s > beat.unix_time_s


def _silence(run: Run, now_unix_s: float) -> str:
    """Of a job whose ranks have written no heartbeat: not yet, or their disk refuses them."""
    if not run.attempts:
        return ""
    began_s, wrote_s = run.attempts[-1].started_unix_s, run.pace.unix_time_s
    if wrote_s > began_s and now_unix_s - wrote_s > _METRICS_SILENT_S:
        return f"no heartbeat, and no metrics for {duration(now_unix_s - wrote_s)}, after step {run.pace.step}"
    if wrote_s <= began_s and now_unix_s - began_s > _START_S:
        return f"no heartbeat and no metrics since it began, {duration(now_unix_s - began_s)} ago"
    return ""


def _patience_s(run: Run, beat: Beat) -> float:
    usual_s = run.pace.seconds_per_step
    # A first step compiles kernels and starts loaders; evaluations and saves have limits of their own.
    if beat.phase not in (WAITING, COMPUTING) or usual_s is None or not run.is_stepping:
        return beat.limit_s
    return min(max(_STEPS_STILL * usual_s, SILENT_S), beat.limit_s)


def pause(run: Run, now_unix_s: float) -> str:
    """What a run does instead of steps, in one line; empty where it steps, or has only just turned from it."""
    beat = current_beat(run)
    if beat is None or beat.phase in (WAITING, COMPUTING) or _is_overtaken(run, beat):
        return ""
    still_s = beat.waiting_s + max(now_unix_s - beat.unix_time_s, 0.0)
    return f"{beat.phase} for {duration(still_s)}, after step {beat.step}" if still_s > _PAUSE_S else ""
