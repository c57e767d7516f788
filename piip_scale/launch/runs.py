"""How every run goes, told from the queue and the files in its directory, without torch."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from piip_scale.errors import PiipError, RunError
from piip_scale.launch.attempts import Attempt, History
from piip_scale.launch.logs import find_logs
from piip_scale.launch.queue import QueuedJob
from piip_scale.launch.run_metrics import Pace, read_pace
from piip_scale.launch.spec import JobFiles, JobSpec, load_spec
from piip_scale.launch.submitting import is_job_of, submitted_jobs
from piip_scale.run.heartbeat import Beat, read_beats
from piip_scale.run.run_dir import RunDirectory, Status
from piip_scale.run.starting import process_age_seconds

MAX_DEPTH = 3
_BEAT_LASTS_S = 60.0
_CLOCK_S = 1.0
# Names of what a run keeps in itself: not searched for further runs.
_OF_A_RUN = {"checkpoints", "tensorboard", "errors", "stacks", "heartbeats", "job"}


@dataclass(frozen=True)
class Run:
    """One run's directory, as far as it can be read.

    Attributes:
        path: The directory.
        spec: Of its job; ``None`` for a run without one.
        status: What the training last said.
        attempts: Of its job.
        job: In the queue; ``None`` where there is none.
        beat: The main rank's last heartbeat.
        pace: How far and fast.
        log: Of its newest job; ``None`` where there is none.
        problem: Why a file of it cannot be read, in one line.
    """

    path: Path
    spec: JobSpec | None
    status: Status | None
    attempts: tuple[Attempt, ...]
    job: QueuedJob | None
    beat: Beat | None
    pace: Pace
    log: Path | None = None
    problem: str = ""

    @property
    def step(self) -> int:
        """Optimiser steps behind it."""
        return max(self.status.step if self.status else 0, self.pace.step)

    @property
    def is_stepping(self) -> bool:
        """Its pace is of the attempt that runs, not of one before it."""
        return not self.attempts or self.pace.unix_time_s > self.attempts[-1].started_unix_s


@dataclass(frozen=True)
class Row:
    """What a list says of a run.

    Attributes:
        run: The directory.
        state: One word: ``queued``, ``running``, ``done``, ``stopped``, ``failed``, ``lost`` ...
        job: As Slurm calls it, or the process and host of a run without one.
        step: Optimiser steps behind it.
        total_steps: Of the whole run.
        images_per_second: While it runs.
        eta_s: To its end, while it runs.
        restarts: Attempts after the first.
        event: What happened last, in one line.
    """

    run: Path
    state: str
    job: str
    step: int
    total_steps: int | None
    images_per_second: float | None
    eta_s: float | None
    restarts: int
    event: str


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Directories of runs in folders, which may be runs themselves; sorted, each once."""
    found = {path for folder in folders for path in _search(folder, MAX_DEPTH)}
    return sorted(found)


def read_run(path: Path, queue: Sequence[QueuedJob]) -> Run:
    """Reads one run's directory; what cannot be read is told in ``problem``."""
    spec, status, problem = None, None, ""
    attempts: tuple[Attempt, ...] = ()
    try:
        spec = load_spec(path)
        status = RunDirectory(path).status()
        attempts = History(JobFiles(path).attempts).read()
    except PiipError as error:
        problem = error.line
    job = find_job(spec, attempts, queue)
    logs = find_logs(spec) if spec else []
    return Run(path, spec, status, attempts, job, main_beat(path), read_pace(path), logs[-1] if logs else None, problem)


def find_job(spec: JobSpec | None, attempts: Sequence[Attempt], queue: Sequence[QueuedJob]) -> QueuedJob | None:
    """The job that trains a run, or that will: one that runs before one that waits."""
    last = attempts[-1].job_id if attempts else 0
    jobs = [job for job in queue if (spec is not None and is_job_of(job, spec)) or job.job_id == last]
    return min(jobs, key=lambda job: (job.is_waiting, job.job_id), default=None)


def refuse_active(paths: Sequence[Path], script: Path, queue: Sequence[QueuedJob]) -> None:
    """Refuses to submit what is being trained, or will be.

    Args:
        paths: Directories of the runs.
        script: Their batch script; other runs of the same sweep share it, and the code that was frozen for it.
        queue: This user's jobs.

    Raises:
        RunError: A job or a process of this machine has one of them.
    """
    jobs = [(script.parent.parent, job) for job in queue if job.command == str(script)]
    runs = [read_run(path, queue) for path in paths]
    jobs += [(run.path, run.job) for run in runs if run.job is not None]
    fix = "piip-scale jobs stop it first, or choose another --run-dir"
    for path, job in jobs:
        raise RunError(f"run directory {path} has job {job.name} ({job.state.lower()})", fix=fix)
    for run in runs:
        trains = run.status is not None and run.status.state == "running" and is_alive(run.beat, time.time())
        if trains and run.beat is not None:
            raise RunError(f"process {run.beat.pid} on {run.beat.host} trains run directory {run.path}", fix=fix)


def main_beat(path: Path) -> Beat | None:
    """The last heartbeat of rank 0, however old."""
    beats = (beat for beat in read_beats(RunDirectory(path).heartbeats, 0.0) if beat.rank == 0)
    return next(beats, None)


def is_alive(beat: Beat | None, now_unix_s: float) -> bool:
    """Whether the process behind a heartbeat still runs: on this machine it is looked at, elsewhere it must beat."""
    if beat is None:
        return False
    if beat.host != socket.gethostname():
        return now_unix_s - beat.unix_time_s < _BEAT_LASTS_S
    # A process that is younger than the heartbeat has only inherited the number.
    return _runs(beat.pid) and now_unix_s - process_age_seconds(beat.pid) <= beat.unix_time_s + _CLOCK_S


def describe(run: Run, now_unix_s: float | None = None) -> Row:
    """One line about a run."""
    alive = is_alive(run.beat, time.time() if now_unix_s is None else now_unix_s)
    state = state_of(run, alive)
    stepping = state == "running" and run.is_stepping
    return Row(
        run=run.path,
        state=state,
        job=_job_text(run, alive),
        step=run.step,
        total_steps=run.pace.total_steps,
        images_per_second=run.pace.images_per_second if stepping else None,
        eta_s=run.pace.eta_s(run.step) if stepping else None,
        restarts=max(len(run.attempts) - 1, 0),
        event=event_of(run, state),
    )


def state_of(run: Run, alive: bool) -> str:
    """A run's state in one word.

    The queue knows best whether something runs; the run's own word counts once it is out of the queue. ``lost`` is a
    run that says it runs and has neither job nor process.
    """
    if run.problem:
        return "unreadable"
    told = run.status.state if run.status else None
    if run.job is not None and told != "done":
        if run.job.is_waiting:
            return "queued"
        return "running" if run.job.state == "RUNNING" else run.job.state.lower()
    if told == "running":
        return "running" if alive else "lost"
    if told is None and run.attempts and run.attempts[-1].end in ("stopped", "done"):
        return str(run.attempts[-1].end)
    return told or ("failed" if run.log else "submitted" if run.spec else "empty")


def event_of(run: Run, state: str) -> str:
    """What happened last, in one line."""
    if run.problem:
        return run.problem
    last = run.attempts[-1] if run.attempts else None
    told = (last.why or last.ending.line) if last else ""
    if state == "queued" and run.job is not None:
        return f"waits ({run.job.reason})" + (f" after: {told}" if told else "")
    if state == "lost":
        return "ended without a word; it goes on with --resume or jobs requeue"
    if state == "running":
        if run.is_stepping and run.pace.event:
            return run.pace.event
        return f"starting, attempt {last.attempt}" if last else "starting"
    if run.status is not None and run.status.line and state in ("failed", "stopped"):
        return run.status.line
    if run.status is None and not told:
        return "ended before it began to train: see jobs logs" if run.log else "was submitted, has not started"
    return told or run.pace.event


def _job_text(run: Run, alive: bool) -> str:
    if run.job is not None:
        return run.job.name
    if alive and run.beat is not None:
        return f"{run.beat.host}:{run.beat.pid}"
    # A task's own number is none that its user was told.
    if run.attempts and run.attempts[-1].job_id and (run.spec is None or run.spec.array_task is None):
        return str(run.attempts[-1].job_id)
    return (submitted_jobs(run.path) or ["-"])[-1]


def _search(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "status.json").is_file() or JobFiles(folder).spec.is_file():
        yield folder
        return
    if not depth:
        return
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and entry.name not in _OF_A_RUN and not entry.name.startswith("."):
                yield from _search(Path(entry.path), depth - 1)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
