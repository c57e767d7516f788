"""Asking a run to stop, or to go back into the queue, whether a job or a process on this machine trains it."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from piip_scale.errors import RunError, SlurmError
from piip_scale.launch import queue
from piip_scale.launch.queue import QueuedJob
from piip_scale.launch.runs import Run, comes_back, is_alive, is_ending
from piip_scale.launch.spec import Request, save_request
from piip_scale.launch.submitting import forget_request, is_job_of, resend
from piip_scale.run.heartbeat import Beat

# What every rank takes as "save, then stop"; the supervisor passes it on.
STOP_SIGNAL = "USR2"


def stop_run(run: Run, jobs: list[QueuedJob]) -> str:
    """Has a run save and end, and takes what waits for it out of the queue; returns one line about what was done.

    Args:
        run: As it was just read.
        jobs: The queue.

    Raises:
        RunError: Nothing of it runs or waits, or it runs on another machine without a job.
        SlurmError: The job is another user's, or gone.
    """
    mine = [job for job in jobs if job == run.job or (run.spec is not None and is_job_of(job, run.spec))]
    if mine:
        return _stop_jobs(run, mine)
    if run.beat is not None and is_alive(run.beat, time.time()):
        _stop_process(run.path, run.beat)
        return f"asked process {run.beat.pid} to save and stop; piip-scale jobs shows when it has"
    raise RunError(f"nothing of {run.path} runs or waits", value=_state(run), fix="piip-scale jobs lists what does")


def requeue_run(run: Run) -> str:
    """Sends a run through the queue again: saves first where it runs; returns one line about what was done.

    Raises:
        RunError: It is done, has no job to requeue, or runs without one.
        SlurmError: Slurm refuses.
    """
    if run.status is not None and run.status.state == "done":
        raise RunError(f"{run.path} is done, at step {run.step}", fix="train another run directory")
    if run.job is not None and (not is_ending(run.job) or comes_back(run)):
        return _requeue_job(run, run.job)
    if run.spec is None or run.spec.script is None:
        raise RunError(
            f"{run.path} was never submitted as a job", fix=f"piip-scale train CONFIG --run-dir {run.path} --resume"
        )
    _ask(run.path, "requeue")
    return f"submitted {run.path} again, as job {resend(run.spec)}"


def _stop_jobs(run: Run, jobs: list[QueuedJob]) -> str:
    # First what would follow: it must not begin while the one before ends.
    waiting, ending = [job for job in jobs if job.is_waiting], [job for job in jobs if is_ending(job)]
    begun = [job for job in jobs if job not in waiting and job not in ending]
    # Also for one that ends: where it goes back into the queue, its next start finds this.
    _ask(run.path, "stop")
    for job in waiting:
        queue.cancel(job)
    for job in ending:
        # Slurm refuses to end what it ends already, and takes from the queue what it is putting there.
        with suppress(SlurmError):
            queue.cancel(job)
    for job in begun:
        queue.signal_batch(job, STOP_SIGNAL)
    actions = [f"asked job {job.name} to save and stop" for job in begun]
    actions += [f"took job {job.name} out of the queue" for job in waiting]
    actions += [f"job {job.name} is ending already, and does not come back" for job in ending]
    return ", ".join(actions) + ("; piip-scale jobs shows when it has" if begun else "")


def _requeue_job(run: Run, job: QueuedJob) -> str:
    if is_ending(job):
        forget_request(run.path)
        return f"job {job.name} is on its way back into the queue already"
    if not job.is_waiting:
        _ask(run.path, "requeue")
        queue.signal_batch(job, STOP_SIGNAL)
        return f"asked job {job.name} to save and wait in the queue again"
    forget_request(run.path)
    if "Held" in job.reason or job.state in ("REQUEUE_HOLD", "SPECIAL_EXIT"):
        queue.release(job)
        return f"job {job.name} was held, and waits for nodes now"
    return f"job {job.name} waits already ({job.reason})"


def _stop_process(run_dir: Path, beat: Beat) -> None:
    if beat.host != socket.gethostname():
        raise RunError(
            f"{run_dir} runs on {beat.host} (process {beat.pid}), not on this machine",
            fix=f"log in there, then: piip-scale jobs stop {run_dir}",
        )
    try:
        os.kill(beat.pid, signal.SIGUSR2)
    except PermissionError as error:
        raise RunError(f"process {beat.pid} of {run_dir} is another user's", fix="ask who started it") from error
    except ProcessLookupError as error:
        raise RunError(f"process {beat.pid} of {run_dir} has just ended") from error


def _ask(run_dir: Path, action: Literal["stop", "requeue"]) -> None:
    save_request(run_dir, Request(action=action, unix_time_s=time.time(), user=_user()))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _state(run: Run) -> str:
    return f"{run.status.state} at step {run.step}" if run.status else "no status"
