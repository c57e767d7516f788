"""How every run goes, read from the queue and the files in its directory, without torch."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from piip_scale.errors import PiipError, RunError
from piip_scale.files import disk_errors
from piip_scale.launch.attempts import Attempt, History
from piip_scale.launch.logs import find_logs
from piip_scale.launch.queue import QueuedJob
from piip_scale.launch.run_metrics import Pace, read_pace
from piip_scale.launch.run_state import LOST, event_of, state_of
from piip_scale.launch.signs import pause, sign_age_s, standstill
from piip_scale.launch.spec import JobFiles, JobSpec, Request, load_request, load_spec
from piip_scale.launch.submitting import is_job_of, submitted_jobs
from piip_scale.run.gpu_time import num_starts
from piip_scale.run.heartbeat import Beat, read_beat, read_beats
from piip_scale.run.run_dir import RunDirectory, Status
from piip_scale.run.starting import process_age_seconds
from piip_scale.run.warned import Warned

MAX_DEPTH = 3
_BEAT_LASTS_S = 60.0
_CLOCK_S = 1.0
# Names of what a run keeps in itself: not searched for further runs.
_OF_A_RUN = {"checkpoints", "tensorboard", "errors", "stacks", "heartbeats", "job", "earlier"}


@dataclass(frozen=True)
class Run:
    """One run's directory, as far as it can be read.

    Attributes:
        path: The directory.
        spec: Of its job; ``None`` for a run without one.
        status: What the training last reported.
        attempts: Of its job.
        job: In the queue; ``None`` where there is none.
        beat: The main rank's last heartbeat.
        pace: How far and fast.
        log: Of its newest job; ``None`` where there is none.
        problem: Why a file of it cannot be read, in one line.
        request: What was last asked of its job.
        status_unix_s: When the training last reported.
        submitted_unix_s: When a job was last submitted for it; ``None`` where none was, or by hand.
        slurm_end: What Slurm calls the end of its last job, where nothing else is known of it; empty where it forgot.
        num_starts: How often it began, by a job or by hand; 0 where that is not known.
        ranks: All ranks' last heartbeats, where the main rank's says that nothing goes on; a file a node, so else none.
        queue_known: Whether the queue could be asked: without it, a job that is not found may wait there.
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
    request: Request | None = None
    status_unix_s: float = 0.0
    submitted_unix_s: float | None = None
    queue_known: bool = True
    slurm_end: str = ""
    num_starts: int = 0
    ranks: tuple[Beat, ...] = ()

    @property
    def step(self) -> int:
        """Optimiser steps behind it."""
        return max(self.status.step if self.status else 0, self.pace.step)

    @property
    def is_stepping(self) -> bool:
        """Its pace is of the attempt that runs, not of one before it."""
        began_unix_s = self.beat.started_unix_s if self.beat else 0.0
        if self.attempts:
            began_unix_s = self.attempts[-1].started_unix_s
        return self.pace.unix_time_s > began_unix_s


@dataclass(frozen=True)
class Row:
    """What a list shows of a run.

    Attributes:
        run: The directory.
        state: One word, as ``state_of`` gives it.
        job: As Slurm calls it, or the process and host of a run without one.
        step: Optimiser steps behind it.
        total_steps: Of the whole run.
        images_per_second: While it steps.
        eta_s: To its end, while it steps.
        restarts: Starts after the first, by a job or by hand.
        event: What happened last, in one line.
        seen_s: How long ago the last sign came that the state rests on, as ``sign_age_s`` has it.
        warnings: What was wrong with it at the last step of its present attempt, or its last one.
        stands_still: Nothing goes on in it that should, ``stopping`` or ``stalled``.
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
    seen_s: float | None = None
    warnings: tuple[Warned, ...] = ()
    stands_still: bool = False

    @property
    def needs_a_look(self) -> bool:
        """Its state is as it should be, but it is not."""
        return bool(self.warnings) if self.state == "running" else self.state == "stopping" and self.stands_still

    @property
    def news(self) -> str:
        """What a list says of it: what is wrong with it comes before what happened since."""
        told = [warned.line for warned in self.warnings] if self.state == "running" else []
        return "; ".join(filter(None, (*told, self.event)))


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Directories of runs in folders, which may be runs themselves, and folders that cannot be looked into; sorted.

    What several links lead to is there once, by its own name where that was found too.
    """
    found = {path for folder in folders for path in _search(folder, MAX_DEPTH)}
    by_place: dict[str, Path] = {}
    for path in sorted(found, key=_by_directness):
        by_place.setdefault(os.path.realpath(path), path)
    return sorted(by_place.values())


def _by_directness(path: Path) -> tuple[bool, bool, int, Path]:
    return os.path.abspath(path) != os.path.realpath(path), path.is_symlink(), len(path.parts), path


def read_run(path: Path, queue: Sequence[QueuedJob] | None) -> Run:
    """Reads one run's directory; what cannot be read is named in ``problem``.

    Args:
        path: The directory.
        queue: This user's jobs; ``None`` where the queue could not be asked.
    """
    spec, status, request, problem = None, None, None, ""
    attempts: tuple[Attempt, ...] = ()
    try:
        # Here, since looking for what is absent succeeds in a folder that cannot be looked into.
        with disk_errors(RunError, f"read {path}"), os.scandir(path):
            pass
        spec = load_spec(path)
        status = RunDirectory(path).status()
        attempts = History(JobFiles(path).attempts).read()
        request = load_request(path)
    except PiipError as error:
        problem = error.line
    logs = find_logs(spec) if spec else []
    run = Run(
        path=path,
        spec=spec,
        status=status,
        attempts=attempts,
        job=find_job(spec, attempts, queue or ()),
        beat=main_beat(path),
        pace=read_pace(path),
        log=logs[-1] if logs else None,
        problem=problem,
        request=request,
        status_unix_s=_modified_unix_s(RunDirectory(path).status_file) or 0.0,
        submitted_unix_s=_modified_unix_s(JobFiles(path).submitted),
        queue_known=queue is not None,
        num_starts=num_starts(RunDirectory(path).gpu_time),
    )
    return replace(run, ranks=_ranks(run)) if standstill(run, time.time()) else run


def _ranks(run: Run) -> tuple[Beat, ...]:
    since_unix_s = run.attempts[-1].started_unix_s if run.attempts else 0.0
    return tuple(read_beats(RunDirectory(run.path).heartbeats, since_unix_s))


def with_ends(runs: Sequence[Run], ask: Callable[[Sequence[int]], Mapping[int, str]]) -> list[Run]:
    """The runs, and of those that ended without a report what Slurm calls it.

    Args:
        runs: As they were read.
        ask: As ``ended_states`` of the queue; called once, and not where no run ended so.
    """
    now_s = time.time()
    lost = {
        run.path: run.attempts[-1].job_id
        for run in runs
        if run.attempts and run.attempts[-1].job_id and state_of(run, is_alive(run.beat, now_s), now_s) == LOST
    }
    ends = ask(sorted(set(lost.values()))) if lost else {}
    return [replace(run, slurm_end=ends.get(lost.get(run.path, 0), "")) for run in runs]


def _modified_unix_s(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def find_job(spec: JobSpec | None, attempts: Sequence[Attempt], queue: Sequence[QueuedJob]) -> QueuedJob | None:
    """The job that trains a run, or that will: one that runs before one that waits."""
    last = attempts[-1].job_id if attempts else 0
    # A task that waits still has its array's number, which is the last task's own.
    task = spec.array_task if spec else None
    jobs = [
        job
        for job in queue
        if (spec is not None and is_job_of(job, spec))
        or (job.job_id == last and (spec is None or job.array_task == task))
    ]
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
    runs = [read_run(path, queue) for path in paths]
    jobs = [(script.parent.parent, job) for job in queue if job.command == str(script) and not is_ending(job)]
    jobs += [(run.path, run.job) for run in runs if run.job and (not is_ending(run.job) or comes_back(run))]
    fix = "piip-scale jobs stop it first, or choose another --run-dir"
    for path, job in jobs:
        raise RunError(f"run directory {path} has job {job.name} ({job.state.lower()})", fix=fix)
    for run in runs:
        trains = run.status is not None and run.status.state == "running" and is_alive(run.beat, time.time())
        if trains and run.beat is not None:
            raise RunError(f"process {run.beat.pid} on {run.beat.host} trains run directory {run.path}", fix=fix)


def is_ending(job: QueuedJob) -> bool:
    """Whether a job's processes have ended, or are being ended; a node may take its time to clean up."""
    return job.state in ("COMPLETING", "STAGE_OUT")


def comes_back(run: Run) -> bool:
    """Whether a job that is ending goes back into the queue, as far as its supervisor decided."""
    return bool(run.attempts) and run.attempts[-1].decision == "requeue"


def main_beat(path: Path) -> Beat | None:
    """The last heartbeat of rank 0, however old."""
    return read_beat(RunDirectory(path).heartbeats, 0)


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
    now_s = time.time() if now_unix_s is None else now_unix_s
    alive = is_alive(run.beat, now_s)
    state = state_of(run, alive, now_s)
    stepping = state == "running" and run.is_stepping and not pause(run, now_s)
    return Row(
        run=run.path,
        state=state,
        job=_job_text(run, alive),
        step=run.step,
        total_steps=run.pace.total_steps,
        images_per_second=run.pace.images_per_second if stepping else None,
        eta_s=run.pace.eta_s(run.step) if stepping else None,
        restarts=max(len(run.attempts), run.num_starts, 1) - 1,
        event=event_of(run, state, now_s),
        seen_s=sign_age_s(run, state, now_s),
        warnings=run.pace.warnings if run.is_stepping else (),
        stands_still=state in ("stalled", "stopping") and bool(standstill(run, now_s)),
    )


def _job_text(run: Run, alive: bool) -> str:
    if run.job is not None:
        return run.job.name
    if alive and run.beat is not None:
        return f"{run.beat.host}:{run.beat.pid}"
    # A task's own number is none that its user was shown.
    if run.attempts and run.attempts[-1].job_id and (run.spec is None or run.spec.array_task is None):
        return str(run.attempts[-1].job_id)
    return (submitted_jobs(run.path) or ["-"])[-1]


def _search(folder: Path, depth: int) -> Iterator[Path]:
    try:
        is_run = (folder / "status.json").is_file() or JobFiles(folder).spec.is_file()
        inner = [] if is_run or not depth else _folders_in(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError:
        # It may be a run, and must not hide those beside it.
        yield folder
        return
    if is_run:
        yield folder
    for each in inner:
        yield from _search(each, depth - 1)


def _folders_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name not in _OF_A_RUN and not entry.name.startswith(".")]
    return [folder / name for name in sorted(names) if os.path.isdir(folder / name)]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
