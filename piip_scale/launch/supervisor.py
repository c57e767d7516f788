"""One process that stays with a training until it is done, or until a person has to look."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from piip_scale.errors import RunError, SlurmError
from piip_scale.files import IO_REASON
from piip_scale.launch.attempts import Attempt, History, next_number
from piip_scale.launch.bad_nodes import add_bad_nodes, choose_nodes, read_bad_nodes
from piip_scale.launch.checking import Check, check_nodes
from piip_scale.launch.decide import Decision, Situation, decide, since_verdict, was_ended_for_good
from piip_scale.launch.executors import Executor, LostNodes
from piip_scale.launch.job_log import log_line
from piip_scale.launch.outcome import Evidence, judge
from piip_scale.launch.run_metrics import read_save_times
from piip_scale.launch.spec import JobFiles, JobSpec, load_request
from piip_scale.launch.step_notes import StepNotes
from piip_scale.launch.time_left import TIME_LIMIT, TimeLeft, lead_s, too_short
from piip_scale.launch.unfinished import close_unfinished, newest_step, wait_for_ranks
from piip_scale.launch.watching import StopRequests, Watch
from piip_scale.run.ending import Ending
from piip_scale.run.heartbeat import read_beats
from piip_scale.run.run_dir import RunDirectory, Status

_MOST_REFUSALS, _REFUSAL_PAUSE_S = 30, 60.0


@dataclass(frozen=True)
class SupervisorSettings:
    """How a supervisor goes about it.

    Attributes:
        preflight: Look at the nodes before each attempt.
        preflight_s: How long that may take.
        poll_s: How often to look at a step.
    """

    preflight: bool = True
    preflight_s: float = 180.0
    poll_s: float = 1.0


class Supervisor:
    """Starts attempts until ``decide`` ends it.

    Args:
        spec: The job.
        executor: Where it runs.
        requests: What is asked of it; its signals are installed.
        settings: How.
    """

    def __init__(self, spec: JobSpec, executor: Executor, requests: StopRequests, settings: SupervisorSettings) -> None:
        self._spec, self._executor, self._requests, self._settings = spec, executor, requests, settings
        self._run, self._files = RunDirectory(spec.run_dir), JobFiles(spec.run_dir)
        self._history = History(self._files.attempts)
        self._time_left = TimeLeft(executor.job_time, self._lead_s)
        self._refusals = 0
        self._gone: dict[str, str] = {}

    def run(self) -> int:
        """Trains to the end, as far as this job can; returns the exit code for it.

        Raises:
            PiipError: The run's directory cannot be written, or another job is training in it.
        """
        status = self._run.status()
        if status and status.state == "done":
            log_line(f"the training is done (step {status.step}); nothing is left to do")
            return 0
        if self._was_ended_for_good():
            log_line("it was stopped for good: piip-scale jobs requeue, or submit --resume, has it go on")
            return 0
        decision = self._settle_the_past()
        while decision is None or decision.action == "restart":
            if decision and decision.pause_s:
                self._pause(decision.pause_s)
            decision = self._attempt_with_patience()
        return self._leave(decision)

    def after_kill(self, how: str) -> int:
        """What follows where this supervisor's own process was killed; returns the exit code for the job.

        Args:
            how: In a few words.

        Raises:
            PiipError: The history cannot be read, or Slurm lets the job neither requeue nor have a successor.
        """
        self._requests.look()
        history = self._history.read()
        last = history[-1] if history else None
        if last is not None and self._is_of_this_start(last) and last.decision in ("finish", "requeue", "give_up"):
            # It was on its way out.
            return self._leave(Decision(last.decision, last.why))
        # Also one without ranks counts, or a job that kills its supervisor at once would come back for ever.
        begun = last if last is not None and last.end is None else self._begin()
        line = f"its supervisor was {how}"
        ended = close_unfinished(begun, self._run, self._executor, self._spec.ranks_per_node, line)
        decision = decide([*self._history.read()[:-1], ended], self._situation(()))
        if decision.action == "restart":
            decision = replace(decision, action="requeue")
        self._note(ended, decision)
        return self._leave(decision)

    def _is_of_this_start(self, attempt: Attempt) -> bool:
        start = (self._executor.job_id, self._executor.restart_count)
        return (attempt.job_id, attempt.restart_count) == start

    def _was_ended_for_good(self) -> bool:
        request = load_request(self._run.path)
        stop_asked = request is not None and request.action == "stop"
        job = (self._executor.job_id, self._executor.restart_count)
        return was_ended_for_good(self._history.read(), *job, stop_asked=stop_asked)

    def _settle_the_past(self) -> Decision | None:
        """Closes an attempt whose supervisor was killed with it; a decision where that ends the job."""
        history = self._history.read()
        if not history or history[-1].end is not None:
            return None
        last = history[-1]
        if last.job_id != self._executor.job_id and self._executor.is_running(last.job_id):
            raise RunError(
                f"job {last.job_id} is training in {self._run.path}",
                rule="a run has one job at a time",
                fix=f"wait for it, or end it with scancel {last.job_id}",
            )
        wait_for_ranks(self._run)
        ended = close_unfinished(last, self._run, self._executor, self._spec.ranks_per_node)
        decision = decide([*history[:-1], ended], self._situation(()))
        if decision.action == "give_up":
            self._note(ended, decision)
            return decision
        self._note(ended, replace(decision, action="requeue"))
        return None

    def _attempt_with_patience(self) -> Decision:
        """An attempt, or a pause where the disk of the run's directory has no room for one."""
        try:
            return self._attempt()
        except RunError as error:
            self._refusals += 1
            if error.reason != IO_REASON or self._refusals > _MOST_REFUSALS:
                raise
            log_line(error.line)
            self._requests.look()
            if self._executor.has_queue and (self._requests.is_ending or self._is_time_over()):
                return Decision("requeue", error.line)
            return Decision("restart", error.line, pause_s=_REFUSAL_PAUSE_S)

    def _attempt(self) -> Decision:
        """One attempt, from the look at the nodes to the decision that follows it."""
        attempt, self._gone = self._begin(), {}
        if line := self._too_short():
            ending = Ending(step=attempt.first_step).failed("short time limit", line)
            short = replace(attempt, end="preflight", ending=ending, last_step=attempt.first_step)
            return self._conclude(replace(short, ended_unix_s=time.time()), {})
        check = self._check(attempt)
        add_bad_nodes(self._files.bad_nodes, check.problems, time.time())
        last = {*read_bad_nodes(self._files.bad_nodes, time.time()), *self._executor.doubtful(check.healthy)}
        nodes = choose_nodes(check.healthy, self._spec.num_nodes, last)
        self._requests.look()
        if self._is_time_over():
            self._requests.end(TIME_LIMIT)
        if self._requests.cause:
            ending = Ending(cause=self._requests.cause, step=attempt.first_step)
            ended = replace(attempt, end="stopped", ending=ending, last_step=attempt.first_step)
        elif len(nodes) < self._spec.num_nodes or check.shared_problem:
            ended = _unfit(attempt, check)
        else:
            ended = self._train(replace(attempt, nodes=nodes))
        return self._conclude(replace(ended, ended_unix_s=time.time()), dict(check.problems) | self._gone)

    def _lead_s(self, limit_s: float | None) -> float:
        return lead_s(read_save_times(self._run.path), since_verdict(self._history.read()), limit_s)

    def _too_short(self) -> str:
        """Whoever set the limit: the command line, a profile, the partition."""
        known = self._time_left.look()
        # Of a batch script that somebody wrote, only they know when it sends its signal.
        asked_s = self._spec.signal_lead_s if self._spec.script else 0
        return too_short(known, max(asked_s, self._time_left.lead_s)) if known else ""

    def _is_time_over(self) -> bool:
        known = self._time_left.look()
        return known is not None and known.left_s <= self._time_left.lead_s

    def _begin(self) -> Attempt:
        history = self._history.read()
        attempt = Attempt(
            attempt=next_number(history),
            job_id=self._executor.job_id,
            restart_count=self._executor.restart_count,
            nodes=self._executor.allocated(),
            started_unix_s=time.time(),
            first_step=newest_step(self._run),
        )
        self._history.write(attempt)
        self._run.clear_traces()
        return attempt

    def _check(self, attempt: Attempt) -> Check:
        """The nodes that are fit to train."""
        lost = dict(self._executor.lost(attempt.nodes))
        there = [node for node in attempt.nodes if node not in lost]
        for line in lost.values():
            log_line(f"attempt {attempt.attempt}: {line}")
        if not self._settings.preflight:
            return Check(tuple(there), lost)
        folder = self._files.folder / f"preflight-{attempt.attempt}"
        check = check_nodes(self._spec, self._executor, there, attempt.attempt, folder, self._settings.preflight_s)
        for node, problem in check.problems.items():
            log_line(f"attempt {attempt.attempt}: node {node} fails its preflight: {problem}")
        log_line(
            f"attempt {attempt.attempt}: preflight of {_count(len(there))} took {check.seconds:.1f} s: {check.line}"
        )
        return replace(check, problems=lost | dict(check.problems))

    def _train(self, attempt: Attempt) -> Attempt:
        """Runs the ranks, and judges what became of them."""
        self._history.write(attempt)
        before = self._status_stamp()
        where = f"{_count(len(attempt.nodes))} ({' '.join(attempt.nodes)})"
        log_line(f"attempt {attempt.attempt}: training from step {attempt.first_step} on {where}")
        number = 2 * attempt.attempt + 1
        step = self._executor.start(
            self._training_arguments(), attempt.nodes, self._spec.ranks_per_node, number, self._run.heartbeats
        )
        watch = Watch(step, self._run, self._requests, self._spec.num_ranks, self._settings.poll_s, self._time_left)
        code = watch.wait()
        status = self._run.status() if self._status_stamp() != before else None
        notes = step.notes()
        # Slurm may think well of them again a moment later.
        self._gone = {node: f"node {node} was lost while it trained" for node in notes.failed_nodes}
        add_bad_nodes(self._files.bad_nodes, self._gone, time.time())
        evidence = self._evidence(attempt, code, status, notes, watch)
        attempt = replace(attempt, waited_for_save_s=watch.waited_for_save_s)
        return judge(attempt, evidence, self._spec.ranks_per_node, time.time())

    def _training_arguments(self) -> list[str]:
        resume = ["--resume"] if self._run.status() else []
        arguments = ["train", str(self._spec.config), f"--run-dir={self._run.path}", *resume]
        arguments += [f"--profile={self._spec.profiled_steps}"] if self._spec.profiled_steps else []
        return arguments + [f"--set={override}" for override in self._spec.overrides]

    def _evidence(self, attempt: Attempt, code: int, status: Status | None, notes: StepNotes, watch: Watch) -> Evidence:
        is_well = status is not None and status.state in ("done", "stopped")
        return Evidence(
            exit_code=code,
            last_step=newest_step(self._run),
            status=status,
            first_error=self._run.first_error(since_unix_s=attempt.started_unix_s),
            notes=notes,
            lost_nodes=() if is_well else self._lost(attempt),
            silence=watch.silence,
            late_save=watch.late_save,
            seen_step=max((beat.step for beat in read_beats(self._run.heartbeats, attempt.started_unix_s)), default=0),
            cause=self._requests.cause or (self._executor.why_ending() if not status or status.state != "done" else ""),
        )

    def _lost(self, attempt: Attempt) -> LostNodes:
        return self._executor.lost(attempt.nodes) or tuple(self._gone.items())

    def _conclude(self, ended: Attempt, problems: Mapping[str, str]) -> Decision:
        self._requests.look()
        if ended.ending.cause in ("preemption", "time limit", "requeue", "cancel") and not self._requests.is_ending:
            self._requests.end(ended.ending.cause)
        self._report_status(ended)
        ended = self._keep_traces(ended)
        history = self._history.read()
        decision = decide([*history[:-1], ended], self._situation(self._bad_now(ended, problems)))
        self._note(ended, decision)
        return decision

    def _bad_now(self, ended: Attempt, problems: Mapping[str, str]) -> tuple[str, ...]:
        bad = dict(problems)
        if ended.end == "lost_node" and ended.ending.node:
            bad[ended.ending.node] = ended.ending.line
        return tuple(bad)

    def _situation(self, bad: tuple[str, ...]) -> Situation:
        nodes = self._executor.allocated()
        lost = {node for node, _ in self._executor.lost(nodes)}
        return Situation(
            num_nodes=self._spec.num_nodes,
            usable_nodes=tuple(node for node in nodes if node not in lost and node not in bad),
            bad_nodes=tuple(sorted({*lost, *bad})),
            max_stale_restarts=self._spec.max_stale_restarts,
            has_queue=self._executor.has_queue,
            is_ending=self._requests.is_ending or self._is_time_over(),
            asked=self._requests.asked,
        )

    def _note(self, ended: Attempt, decision: Decision) -> None:
        """One line for the log, the same for the history, the nodes for the next."""
        self._history.write(replace(ended, decision=decision.action, why=decision.why))
        reasons = {node: ended.ending.line or ended.end or "" for node in decision.exclude if node == ended.ending.node}
        add_bad_nodes(self._files.bad_nodes, reasons, time.time())
        action = decision.action.replace("_", " ")
        without = f", without {', '.join(decision.exclude)}" if decision.exclude else ""
        log_line(f"attempt {ended.attempt}: {decision.why} -> {action}{without}")

    def _report_status(self, ended: Attempt) -> None:
        """Reports what ranks could not report, in the status and in ``errors/``."""
        first = self._run.first_error(since_unix_s=ended.started_unix_s)
        if not ended.failed:
            return
        try:
            if first is None or first.line != ended.ending.line:
                self._run.replace_ending(ended.ending)
            elif self._run.status():
                # A rank that was woken may have written at the same moment that it runs.
                self._run.write_failure(first)
        except RunError as error:
            # What follows does not depend on it, and the history has the same.
            log_line(error.line)

    def _leave(self, decision: Decision) -> int:
        if decision.action == "requeue":
            try:
                log_line(self._executor.requeue(decision.exclude))
            except SlurmError as error:
                last = self._history.read()[-1]
                self._history.write(replace(last, decision="give_up", why=f"{last.why}; {error.line}"))
                raise
            return 0
        if decision.action == "finish":
            return 0
        self._executor.end_chain()
        return 1

    def _keep_traces(self, ended: Attempt) -> Attempt:
        """Errors and stacks stay beside the history, where the next attempt does not replace them."""
        folder = self._files.folder / f"attempt-{ended.attempt}"
        with suppress(OSError):
            for source in (self._run.errors, self._run.stacks):
                if source.is_dir() and any(source.iterdir()):
                    shutil.copytree(source, folder / source.name, dirs_exist_ok=True)
        line = ended.ending.line.replace(str(self._run.stacks), str(folder / "stacks"))
        return replace(ended, ending=replace(ended.ending, line=line))

    def _pause(self, seconds: float) -> None:
        log_line(f"waiting {seconds:.0f} s before the next attempt")
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s and not self._requests.cause and not self._is_time_over():
            time.sleep(self._settings.poll_s)
            self._requests.look()

    def _status_stamp(self) -> tuple[int, int] | None:
        return _stamp(self._run.status_file)


def _unfit(attempt: Attempt, check: Check) -> Attempt:
    """An attempt that its nodes, or its config, did not allow to begin."""
    ended = replace(attempt, end="preflight", last_step=attempt.first_step)
    blank = Ending(step=attempt.first_step)
    if check.shared_problem:
        reason, line = check.shared_problem
        return replace(ended, ending=blank.failed(reason, line))
    line = "; ".join(f"{node}: {problem}" for node, problem in check.problems.items()) or "too few nodes"
    node = next(iter(check.problems), "")
    return replace(ended, ending=blank.failed("preflight", line, node=node))


def _count(num_nodes: int) -> str:
    return f"{num_nodes} node" + "s" * (num_nodes != 1)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
