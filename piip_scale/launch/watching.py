"""Looking after a step while it runs: signals and requests go in, silence does not go on for ever."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from types import FrameType

from piip_scale.launch.decide import Asked
from piip_scale.launch.executors import Step
from piip_scale.launch.job_log import log_line
from piip_scale.launch.spec import Request, load_request
from piip_scale.launch.time_left import LEAVING_S, TIME_LIMIT, USUAL_KILL_WAIT_S, TimeLeft
from piip_scale.run.heartbeat import Beat, read_beats
from piip_scale.run.run_dir import RunDirectory

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_REQUEST_EVERY_S = 2.0
_BEATS_EVERY_S = 10.0
_SILENCE_MARGIN_S = 60.0
_START_LIMIT_S = 3600.0
_STACKS_WITHIN_S = 5.0
_END_AGAIN_AFTER_S = 20.0
_SAME_TERM_S = 5.0
_LEAST_GRACE_S = 1.0


class StopRequests:
    """What signals and requests asked of this job so far.

    Attributes:
        cause: Why ranks are to stop: ``time limit``, ``preemption``, ``requeue``, ``user``; empty while they are not.
        asked: What the user asked for.
        is_ending: The allocation is about to end.
        is_impatient: A second Ctrl-C came: end at once.
        leave_by_s: Until when, by the monotonic clock, this process must be gone by itself: Slurm kills it then.

    Args:
        run: Whose requests count; one that is there already is of an earlier job.
        why_ending: What Slurm is about when it sends TERM.
        kill_wait_s: How long after a last TERM Slurm kills.
    """

    def __init__(
        self,
        run: RunDirectory,
        why_ending: Callable[[], str],
        kill_wait_s: Callable[[], float] = lambda: USUAL_KILL_WAIT_S,
    ) -> None:
        self._kill_wait_s = kill_wait_s
        self.cause = ""
        self.asked: Asked = ""
        self.is_ending = False
        self.is_impatient = False
        self.leave_by_s = math.inf
        self._term_s: float | None = None
        self._run, self._why_ending = run, why_ending
        self._received: list[int] = []
        self._old = load_request(run.path)
        self._looked_s = -math.inf

    def install(self) -> None:
        """Takes the signals over. Main thread only."""
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(number)

    def look(self) -> None:
        """Takes in what has come since."""
        # A request is written first, and then a signal sent that has it read.
        if self._received or time.monotonic() - self._looked_s > _REQUEST_EVERY_S:
            self._looked_s = time.monotonic()
            request = load_request(self._run.path)
            if request and request != self._old:
                self._old = request
                self._take_request(request)
        while self._received:
            self._take(self._received.pop(0))

    def _take(self, number: int) -> None:
        if number == signal.SIGINT:
            self.is_impatient = self.asked == "stop"
            self.asked, self.cause = "stop", "user"
        elif number == signal.SIGUSR2:
            self.end(self._why_ending() or "time limit")
        else:
            self._take_term()
        log_line(f"{signal.Signals(number).name} came: {self.cause}")

    def _take_term(self) -> None:
        cause, now_s = self._why_ending() or "TERM", time.monotonic()
        self._term_s = self._term_s or now_s
        # A job that is preempted gets a first TERM at the begin of its grace and another at its end. Several processes
        # may hand on one and the same.
        is_again = now_s - self._term_s > _SAME_TERM_S
        if cause == TIME_LIMIT or (is_again and cause == "preemption"):
            self.leave_by_s = min(self.leave_by_s, now_s + max(self._kill_wait_s() - LEAVING_S, _LEAST_GRACE_S))
        self.end(cause)

    def end(self, cause: str) -> None:
        """The job ends, for a cause that ``why_ending`` gave."""
        self.is_ending = True
        if cause == "cancel":
            self.asked = "cancel"
        self.cause = self.cause or cause

    def _take_request(self, request: Request) -> None:
        self.asked, self.cause = request.action, "user" if request.action == "stop" else "requeue"
        log_line(f"{request.action} was asked for" + f" by {request.user}" * bool(request.user))


class Watch:
    """Waits for a step of ranks.

    Attributes:
        silence: What was seen of ranks that gave no sign for too long, in one line; empty where they did.
        late_save: Likewise of ranks that had not saved in time.
        waited_for_save_s: How long they had had for it.

    Args:
        step: The step.
        run: The run, whose heartbeats are read.
        requests: What is asked of the job.
        num_ranks: Ranks of the step.
        poll_s: How often to look.
        time_left: Of the job.
    """

    def __init__(
        self,
        step: Step,
        run: RunDirectory,
        requests: StopRequests,
        num_ranks: int,
        poll_s: float,
        time_left: TimeLeft,
    ) -> None:
        self.silence, self.late_save, self.waited_for_save_s = "", "", 0.0
        self._time_left = time_left
        self._step, self._run, self._requests = step, run, requests
        self._num_ranks, self._poll_s = num_ranks, poll_s
        self._began_s, self._began_unix_s = time.monotonic(), time.time()
        self._asked_s = 0.0
        self._ended_s, self._read_s = 0.0, 0.0
        self._newest_unix_s, self._moved_s = 0.0, time.monotonic()
        self._limit_s = _START_LIMIT_S

    def wait(self) -> int:
        """Until the step has ended; returns its exit code."""
        while (code := self._step.poll()) is None:
            time.sleep(self._poll_s)
            self._requests.look()
            self._look_at_time()
            self._end_at_once()
            # A file for each node, on a disk that all share: not more often than needed.
            is_wanted = bool(self._requests.cause) and not self._asked_s
            if is_wanted or time.monotonic() - self._read_s >= _BEATS_EVERY_S:
                self._read_s = time.monotonic()
                beats = list(read_beats(self._run.heartbeats, self._began_unix_s))
                self._pass_on(beats)
                self._look_for_silence(beats)
        return code

    def _look_at_time(self) -> None:
        """Slurm's own signal may come too late for this run's saves, and after its end nobody requeues the job."""
        known = self._time_left.look()
        left_s = min(known.left_s if known else math.inf, self._requests.leave_by_s - time.monotonic() + LEAVING_S)
        if left_s <= self._time_left.lead_s and not self._requests.cause:
            log_line(f"{left_s:.0f} s are left of the job; a save may take {self._time_left.lead_s:.0f} s")
            self._requests.end(TIME_LIMIT)
        if left_s <= LEAVING_S and not self._ended_s:
            self._end_unsaved()

    def _end_unsaved(self) -> None:
        """While somebody is still there who can send the job back into the queue."""
        self.waited_for_save_s = time.monotonic() - self._asked_s if self._asked_s else 0.0
        what = (
            f"had not saved {self.waited_for_save_s:.0f} s after they were asked to"
            if self._asked_s
            else "had not begun"
        )
        self.late_save = f"the ranks {what}, and the time of the job was over"
        self._end()

    def _end_at_once(self) -> None:
        again = self._ended_s and time.monotonic() - self._ended_s > _END_AGAIN_AFTER_S
        if again or (self._requests.is_impatient and not self._ended_s):
            self._end()

    def _pass_on(self, beats: list[Beat]) -> None:
        # Before a rank's first beat, a signal would kill it.
        if self._requests.cause and not self._asked_s and len(beats) == self._num_ranks:
            self._asked_s = time.monotonic()
            log_line("asking the ranks to save and stop")
            self._step.ask_to_stop()

    def _look_for_silence(self, beats: list[Beat]) -> None:
        now_s = time.monotonic()
        newest = max((beat.unix_time_s for beat in beats), default=0.0)
        if newest != self._newest_unix_s:
            # By this machine's clock alone: those of others may differ.
            self._newest_unix_s, self._moved_s = newest, now_s
            self._limit_s = max(beat.limit_s for beat in beats)
        waited_s = now_s - self._moved_s
        if waited_s > self._limit_s + _SILENCE_MARGIN_S and not self._ended_s:
            self.silence = f"no rank gave any sign for {waited_s:.0f} s, so they were ended from outside"
            self._step.ask_for_stacks()
            time.sleep(_STACKS_WITHIN_S)
            self._end()

    def _end(self) -> None:
        self._ended_s = time.monotonic()
        self._step.end()
