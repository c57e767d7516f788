"""Submitting a run, or a sweep of runs, as a job: what will be sent is decided first, then frozen, checked and sent."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from piip_scale.errors import ConfigError, RunError
from piip_scale.files import disk_errors, write_text_atomically
from piip_scale.launch.freeze import Frozen, freeze_code, freeze_config
from piip_scale.launch.installed_files import launch_folder
from piip_scale.launch.options import OptionValue, time_limit_s
from piip_scale.launch.profiles import Profile
from piip_scale.launch.queue import QueuedJob, check_submission, submit_script
from piip_scale.launch.render import log_pattern, render_script
from piip_scale.launch.spec import JobFiles, JobSpec, save_spec
from piip_scale.launch.sweeps import Point


@dataclass(frozen=True)
class Order:
    """What a user asks to be submitted.

    Attributes:
        config: The config file.
        run_dir: The run's directory, or that of a sweep, whose runs are folders in it.
        working_dir: Where the job starts.
        num_nodes: Nodes that train.
        ranks_per_node: GPUs, and so ranks, of a node.
        overrides: ``--set``.
        points: Runs of a sweep; empty for a single run.
        array_limit: ``%N``: so many of them at once.
        name: The job's name.
        spares: Nodes beyond ``num_nodes``.
        chain: Further jobs, each after the one before.
        max_stale_restarts: As in ``JobSpec``.
        profile_name: The site's profile; empty for none.
        profile: Its content.
        options: Options of the job from the command line, the profile and the environment, merged.
    """

    config: Path
    run_dir: Path
    working_dir: Path
    num_nodes: int
    ranks_per_node: int
    overrides: tuple[str, ...] = ()
    points: tuple[Point, ...] = ()
    array_limit: str = ""
    name: str = ""
    spares: int = 0
    chain: int = 0
    max_stale_restarts: int = 3
    profile_name: str = ""
    profile: Profile = field(default_factory=Profile)
    options: Mapping[str, OptionValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Submission:
    """A job as it will be sent.

    Attributes:
        folder: Of the run, or of the sweep; its ``job/`` keeps the script.
        specs: One, or those of a sweep's runs.
        script: The batch script's text.
    """

    folder: Path
    specs: tuple[JobSpec, ...]
    script: str

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
    in_container = order.profile.container is not None
    check_path("--run-dir", order.run_dir, in_container=in_container)
    check_path("the folder to submit from", order.working_dir, in_container=in_container)
    _check_time(str(order.options.get("time", "")), order.profile.signal_lead_s)
    specs = tuple(_spec(order, point) for point in order.points or (None,))
    template = (launch_folder() / "train.sbatch").read_text(encoding="utf-8")
    script = render_script(template, specs, order.profile, order.options, order.array_limit)
    return Submission(order.run_dir, specs, script)


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


def _check_time(limit: str, lead_s: int) -> None:
    limit_s = time_limit_s(limit)
    if limit_s is not None and limit_s <= lead_s:
        raise ConfigError(
            "time limit",
            value=limit,
            rule=f"longer than the {lead_s} s before its end at which the training is told to save",
            fix="raise --time, or lower signal_lead_s in a profile",
        )


def send(submission: Submission, configs: Sequence[str]) -> list[int]:
    """Checks the script with Slurm, freezes what will run, and submits; returns the ids, more than one of a chain.

    Args:
        submission: What to send.
        configs: The resolved config of each spec, as text.

    Raises:
        SlurmError: Slurm refuses; nothing is left behind where it does so at the check.
        RunError: The disk refuses.
    """
    spec, files = submission.specs[0], submission.files
    check_submission(submission.script, spec.working_dir)
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
        after = [f"--dependency=afterany:{job_ids[-1]}"] if job_ids else []
        job_ids.append(submit_script(files.script, spec.working_dir, after))
        for each in submission.specs:
            note_submitted(each, job_ids[-1])
    return job_ids


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
    except (OSError, ValueError, KeyError, TypeError):
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


def _spec(order: Order, point: Point | None) -> JobSpec:
    run_dir = order.run_dir / point.name if point else order.run_dir
    files, own = JobFiles(order.run_dir), JobFiles(run_dir)
    profile, container = order.profile, order.profile.container
    python = profile.python or sys.executable
    gpus = 0 if profile.gpu_request == "none" else order.ranks_per_node
    folders = (order.run_dir, order.working_dir)
    prefix = container.command_prefix(folders, order.working_dir, gpus=gpus > 0) if container else ()
    return JobSpec(
        name=order.name or order.run_dir.name,
        run_dir=run_dir,
        working_dir=order.working_dir,
        config=Frozen(own.frozen).config,
        source_config=order.config,
        given_overrides=(*order.overrides, *(point.overrides if point else ())),
        num_nodes=order.num_nodes,
        ranks_per_node=order.ranks_per_node,
        gpus_per_node=gpus,
        spares=order.spares,
        time_limit=str(order.options.get("time", "")),
        signal_lead_s=profile.signal_lead_s,
        max_stale_restarts=order.max_stale_restarts,
        requeue=profile.requeue and not order.chain,
        chain=order.chain,
        array_task=point.index if point else None,
        profile=order.profile_name,
        script=files.script,
        log=log_pattern(files.folder, array=point is not None),
        python=python,
        rank_python=container.python if container else python,
        code_dir=Frozen(files.frozen).code,
        srun_options=(*profile.srun, *(container.srun_options(folders, order.working_dir) if container else ())),
        command_prefix=prefix,
    )
