"""How much time a job has left, and how long before its end the ranks must be asked to save."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from piip_scale.launch.attempts import Attempt
from piip_scale.launch.run_metrics import SaveTimes

TIME_LIMIT, LATE_SAVE = "time limit", "late save"
# What a job does after its ranks have ended, or were ended: judging, writing, going back into the queue.
LEAVING_S = 10.0
# From Slurm's TERM to its KILL, where a site has not changed it.
USUAL_KILL_WAIT_S = 30.0
# A save may wait for the one before it, and a shared disk is slower at times than it was when it was measured.
_SAVES, _SLOWER, _MARGIN_S = 2, 1.5, LEAVING_S + 5.0
_ASK_EVERY_S = 30.0


@dataclass(frozen=True)
class JobTime:
    """The time of a job.

    Attributes:
        limit_s: How long it may run.
        left_s: How much of that is left.
    """

    limit_s: float
    left_s: float


def lead_s(times: SaveTimes, history: Sequence[Attempt], limit_s: float | None = None) -> float:
    """How long before the end the ranks must be asked to save, by what is known of their saves.

    Args:
        times: What saves and steps of this run took, or what a first save is expected to.
        history: Earlier attempts: where one could not save in time, the next gets twice that.
        limit_s: How long the job may run; ``None`` without a limit.
    """
    measured_s = _SLOWER * (_SAVES * times.save_s + times.step_s)
    late_s = [2 * attempt.waited_for_save_s for attempt in history]
    known_s = max(measured_s, *late_s, 0.0) + _MARGIN_S
    if times.save_s or max(late_s, default=0.0):
        return known_s
    # Only expected: that must not keep a job from training, and half of its time is there to find out.
    expected_s = _SLOWER * (_SAVES * times.expected_save_s + times.step_s) + _MARGIN_S
    return max(known_s, expected_s if limit_s is None else min(expected_s, limit_s / 2))


def too_short(job_time: JobTime, needed_s: float) -> str:
    """Why a job's limit leaves no time to train in, in one line; empty where it does."""
    if job_time.limit_s > needed_s:
        return ""
    return (
        f"the job may run {job_time.limit_s:.0f} s, and its ranks are asked to save {needed_s:.0f} s before the end; "
        "raise --time, or the partition's DefaultTime where none was given, or lower signal_lead_s in the profile"
    )


class TimeLeft:
    """The time left of a job, asked for seldom and counted in between.

    Args:
        ask: The job's time; ``None`` where it has no limit, or nobody knows.
        lead: The present lead in seconds, as ``lead_s`` gives it for the job's limit.

    Attributes:
        lead_s: That, as it was at the last look.
    """

    def __init__(self, ask: Callable[[], JobTime | None], lead: Callable[[float | None], float]) -> None:
        self._ask, self._lead = ask, lead
        self._asked_s: float | None = None
        self._known: JobTime | None = None
        self.lead_s = 0.0

    def look(self) -> JobTime | None:
        """The time as it is by now; ``None`` where there is no limit to it."""
        now_s = time.monotonic()
        if self._asked_s is None or now_s - self._asked_s >= _ASK_EVERY_S:
            # Anew, since somebody may have changed the limit, and a save may have been slower than those before.
            found = self._ask()
            self._asked_s, self._known = time.monotonic(), found or self._counted(now_s)
            self.lead_s = self._lead(self._known.limit_s if self._known else None)
        return self._counted(now_s)

    def _counted(self, now_s: float) -> JobTime | None:
        if self._known is None or self._asked_s is None:
            return None
        return JobTime(self._known.limit_s, self._known.left_s - max(now_s - self._asked_s, 0.0))
