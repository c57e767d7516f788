"""Submitting a run, or a sweep of runs, as a job: what will be sent is decided first, then frozen, checked and sent."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from piip_scale.errors import ConfigError, RunError
from piip_scale.files import disk_errors, write_text_atomically
from piip_scale.launch.admission import check_admission
from piip_scale.launch.freeze import Frozen, freeze_code, freeze_config
from piip_scale.launch.installed_files import launch_folder
from piip_scale.launch.limits import absolute_moment, check_lead, given_limits
from piip_scale.launch.options import OptionValue, first_only_words
from piip_scale.launch.profiles import Profile
from piip_scale.launch.queue import QueuedJob, submit_script
from piip_scale.launch.render import log_pattern, render_script
from piip_scale.launch.spec import JobFiles, JobSpec, save_spec
from piip_scale.launch.sweeps import Point


@dataclass(frozen=True)
class Order:
    """What a user asks to be submitted.

    Attributes:
        job: The job as it was asked for; its site's facts are filled in from ``profile``. Of a sweep, whose runs are
            folders in it, the run's directory is that of all.
        profile: The site.
        options: Options of the job from the command line, the profile and the environment, merged.
        points: Runs of a sweep; empty for a single run.
        array_limit: ``%N``: so many of them at once.
    """

    job: JobSpec
    profile: Profile = field(default_factory=Profile)
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    array_limit: str = ""


@dataclass(frozen=True)
class Submission:
    """A job as it will be sent.

    Attributes:
        folder: Of the run, or of the sweep; its ``job/`` keeps the script.
        specs: One, or those of a sweep's runs.
        script: The batch script's text.
        options: Options of the job.
    """

    folder: Path
    specs: tuple[JobSpec, ...]
    script: str
    options: Mapping[str, OptionValue] = field(default_factory=dict)

    @property
    def files(self) -> JobFiles:
        """The job's files."""
        return JobFiles(self.folder)


def plan_submission(order: Order) -> Submission:
    """What an order comes to; writes and sends nothing.

    Raises:
        ConfigError: A name that cannot stand in a batch script, or a time limit too short to save in.
        RunError: The batch script is not installed.
    """
    job, in_container = order.job, order.profile.container is not None
    check_path("--run-dir", job.run_dir, in_container=in_container)
    check_path("the folder to submit from", job.working_dir, in_container=in_container)
    options = dict(order.options)
    if isinstance(deadline := options.get("deadline"), str):
        # A relative one would begin anew with each job that goes on.
        options["deadline"] = absolute_moment(deadline, time.time())
    check_lead(given_limits(options), order.profile.signal_lead_s)
    shared = job.with_facts(**site_facts(job, order.profile), time_limit=str(options.get("time", "")))
    specs = tuple(_run_spec(shared, point) for point in order.points or (None,))
    template = (launch_folder() / "train.sbatch").read_text(encoding="utf-8")
    script = render_script(template, specs, order.profile, options, order.array_limit)
    return Submission(job.run_dir, specs, script, options)


def check_path(what: str, path: Path, *, in_container: bool = False) -> None:
    """Refuses what Slurm cannot take in a path: it reads backslashes in a log's path in its own way.

    Raises:
        ConfigError: It holds a backslash or a control character, is not UTF-8, or no container could mount it.
    """
    text = str(path)
    if in_container and {":", ","} & set(text):
        raise ConfigError(what, value=text, rule="a path without : and , which separate the mounts of a container")
    if "\\" in text or not text.isprintable():
        raise ConfigError(what, value=text, rule="a path without backslashes and line breaks: Slurm misreads them")


def send(submission: Submission, configs: Sequence[str]) -> tuple[list[int], list[str]]:
    """Checks the script with Slurm, freezes what will run, and submits.

    Args:
        submission: What to send.
        configs: The resolved config of each spec, as text.

    Returns:
        The ids, more than one of a chain; and what is worth a line for the user.

    Raises:
        SlurmError: Slurm refuses; nothing is left behind where it does so at the check.
        ConfigError: A time limit of the site leaves no time to save.
        RunError: The disk refuses.
    """
    spec, files = submission.specs[0], submission.files
    notes = check_admission(submission.script, spec, submission.options)
    freeze_code(files.frozen)
    for each, text in zip(submission.specs, configs, strict=True):
        freeze_config(JobFiles(each.run_dir).frozen, text)
        forget_request(each.run_dir)
        save_spec(each)
    with disk_errors(RunError, f"write {files.script}"):
        write_text_atomically(files.script, submission.script)
        files.script.chmod(0o755)
    job_ids: list[int] = []
    for _ in range(spec.chain + 1):
        after = [f"--dependency=afterany:{job_ids[-1]}"] if job_ids else first_only_words(submission.options)
        job_ids.append(submit_script(files.script, spec.working_dir, after))
        for each in submission.specs:
            note_submitted(each, job_ids[-1])
    return job_ids, notes


def resend(spec: JobSpec) -> int:
    """Submits a run's script once more, as it was; returns the new job's id.

    Raises:
        RunError: The script is gone.
        SlurmError: Slurm refuses.
    """
    if spec.script is None or not spec.script.is_file():
        raise RunError(f"the batch script of {spec.run_dir} is gone", fix="use piip-scale submit --resume")
    options = [] if spec.array_task is None else [f"--array={spec.array_task}"]
    job_id = submit_script(spec.script, spec.working_dir, options)
    note_submitted(spec, job_id)
    return job_id


def note_submitted(spec: JobSpec, job_id: int) -> None:
    """Remembers that a job was submitted for a run.

    Raises:
        RunError: The disk refuses.
    """
    path = JobFiles(spec.run_dir).submitted
    name = str(job_id) if spec.array_task is None else f"{job_id}_{spec.array_task}"
    with disk_errors(RunError, f"write {path}"), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"job": name, "unix_time_s": time.time()}) + "\n")


def submitted_jobs(run_dir: Path) -> list[str]:
    """Names of the jobs that were submitted for a run, the newest last."""
    try:
        lines = JobFiles(run_dir).submitted.read_text(encoding="utf-8").splitlines()
        return [str(json.loads(line)["job"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def forget_request(run_dir: Path) -> None:
    """Takes back what was asked of an earlier job.

    Raises:
        RunError: The disk refuses.
    """
    path = JobFiles(run_dir).request
    with disk_errors(RunError, f"remove {path}"):
        path.unlink(missing_ok=True)


def is_job_of(job: QueuedJob, spec: JobSpec) -> bool:
    """Whether a job in the queue trains a run: it runs the run's script, and in a sweep the run's task of it."""
    return spec.script is not None and job.command == str(spec.script) and job.array_task == spec.array_task


def site_facts(job: JobSpec, profile: Profile) -> dict[str, Any]:
    """What a site makes of a job, by the names of ``JobSpec``."""
    container, python = profile.container, profile.python or sys.executable
    folders = (job.run_dir, job.working_dir)
    return {
        "gpus_per_node": 0 if profile.gpu_request == "none" else job.ranks_per_node,
        "signal_lead_s": profile.signal_lead_s,
        "requeue": profile.requeue and not job.chain,
        "python": python,
        "rank_python": container.python if container else python,
        "srun_options": (*profile.srun, *(container.srun_options(folders, job.working_dir) if container else ())),
        "command_prefix": container.command_prefix(folders, job.working_dir) if container else (),
        "site_variables": tuple(profile.environment),
        "local_cache": profile.local_cache,
    }


def _run_spec(job: JobSpec, point: Point | None) -> JobSpec:
    """The job of one run, with the files that are its own."""
    run_dir = job.run_dir / point.name if point else job.run_dir
    files = JobFiles(job.run_dir)
    return job.with_facts(
        run_dir=run_dir,
        config=Frozen(JobFiles(run_dir).frozen).config,
        given_overrides=(*job.given_overrides, *(point.overrides if point else ())),
        array_task=point.index if point else None,
        script=files.script,
        log=log_pattern(files.folder, array=point is not None),
        code_dir=Frozen(files.frozen).code,
    )
