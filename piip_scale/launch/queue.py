"""The queue as a user asks about it: which jobs there are, submitting, signalling, cancelling."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from piip_scale.errors import SlurmError
from piip_scale.launch.options import submitting_environment
from piip_scale.launch.slurm_records import (
    NodeRecord,
    PartitionRecord,
    parse_duration,
    parse_job,
    parse_nodes,
    parse_partitions,
)

_TIMEOUT_S = 60.0
# The command comes last: it alone may hold the separator.
_FIELDS = "%A|%F|%K|%T|%r|%L|%N|%o"
_NONE = ("N/A", "(null)", "")
# What the commands print where they find no cluster; a node's configuration is another matter.
_NO_CLUSTER = re.compile(r"configuration (file|source)|slurm\.conf|ClusterName")


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits, runs or is ending.

    Attributes:
        name: What Slurm's commands call it: ``12``, or ``12_3`` for a task of an array.
        job_id: Its number; a task's own once it runs.
        array_task: Index in its array; ``None`` outside of one.
        state: ``PENDING``, ``RUNNING``, ``COMPLETING`` ...
        reason: Why it waits, as Slurm names it.
        time_left: Until its limit, as Slurm writes it.
        nodes: Where it runs, as Slurm writes them.
        command: Its script, with arguments.
    """

    name: str
    job_id: int
    array_task: int | None
    state: str
    reason: str
    time_left: str
    nodes: str
    command: str

    @property
    def is_waiting(self) -> bool:
        """It has not begun, or waits for its next attempt."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")


def has_slurm() -> bool:
    """Whether Slurm's commands are on this machine."""
    return shutil.which("squeue") is not None


def queued_jobs() -> list[QueuedJob]:
    """This user's jobs.

    Raises:
        SlurmError: The controller does not answer.
    """
    return parse_queue(_run("squeue", "--me", "--noheader", "--array", f"--format={_FIELDS}"))


def parse_queue(text: str) -> list[QueuedJob]:
    """Jobs from squeue's lines in our format; lines of another are passed over."""
    jobs = []
    for line in text.splitlines():
        fields = line.split("|", _FIELDS.count("|"))
        if len(fields) != _FIELDS.count("|") + 1 or not fields[0].isdecimal():
            continue
        number, array, task, state, reason, left, nodes, command = fields
        index = int(task) if task.isdecimal() else None
        name = number if index is None else f"{array}_{index}"
        jobs.append(QueuedJob(name, int(number), index, state, reason, left, "" if nodes in _NONE else nodes, command))
    return jobs


def ended_states(job_ids: Sequence[int]) -> dict[int, str]:
    """What Slurm calls the ends of jobs that have left the queue, ``NODE_FAIL`` for instance; without those it forgot.

    From its accounts; where a site keeps none, from the controller, which remembers for some minutes.
    """
    if not job_ids:
        return {}
    try:
        listed = ",".join(map(str, job_ids))
        shown = _run(
            "sacct", "--noheader", "--parsable2", "--allocations", "--format=JobIDRaw,State", f"--jobs={listed}"
        )
    except SlurmError:
        shown = ""
    found = parse_ends(shown)
    return {job_id: state for job_id in job_ids if (state := found.get(job_id) or _remembered_state(job_id))}


def parse_ends(text: str) -> dict[int, str]:
    """States by job from sacct's lines of number and state; of a job that ran again, the last counts."""
    rows = (line.partition("|") for line in text.splitlines())
    # CANCELLED by 1000
    return {int(job): state.split()[0] for job, _, state in rows if job.isdecimal() and state.strip()}


def _remembered_state(job_id: int) -> str:
    try:
        return parse_job(_run("scontrol", "show", "job", "-o", str(job_id)), str(job_id)).state
    except SlurmError:
        return ""


def check_submission(script: str, folder: Path, options: Sequence[str] = ()) -> str:
    """Asks Slurm whether it would take a script, without submitting it; returns when it would start, as it prints it.

    Raises:
        SlurmError: It would not, with its message.
    """
    prefix = "Slurm would refuse the job"
    reply = _run("sbatch", "--test-only", *options, stdin=script, folder=folder, prefix=prefix)
    lines = [line.removeprefix("sbatch: ").strip() for line in reply.splitlines()]
    return next((line for line in lines if line.startswith("Job ")), "")


def submit_script(script: Path, folder: Path, options: Sequence[str] = ()) -> int:
    """Submits a script; returns the job's id.

    Raises:
        SlurmError: Slurm refuses.
    """
    reply = _run("sbatch", "--parsable", *options, str(script), folder=folder, prefix="Slurm refuses the job")
    lines = reply.strip().splitlines()
    if not lines or not lines[-1].split(";")[0].isdecimal():
        raise SlurmError("cannot read the id of the submitted job", value=reply[:200])
    return int(lines[-1].split(";")[0])


def nodes() -> list[NodeRecord]:
    """All nodes of the cluster.

    Raises:
        SlurmError: The controller does not answer.
    """
    return list(parse_nodes(_run("scontrol", "show", "node", "-o")).values())


def partitions() -> list[PartitionRecord]:
    """All partitions of the cluster.

    Raises:
        SlurmError: The controller does not answer.
    """
    return parse_partitions(_run("scontrol", "show", "partition", "-o"))


def qos_limits_s(names: Sequence[str]) -> dict[str, int]:
    """The longest time limit of each quality of service that has one; none where the site keeps no accounts."""
    if not names:
        return {}
    try:
        shown = _run(
            "sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=name,maxwall", f"name={','.join(names)}"
        )
    except SlurmError:
        # A cluster without a database has none; a limit that Slurm sets all the same is met in the job.
        return {}
    rows = (line.partition("|") for line in shown.splitlines())
    return {name: parse_duration(limit) or 0 for name, _, limit in rows if re.fullmatch(r"[\d:-]+", limit)}


def signal_batch(job: QueuedJob, name: str) -> None:
    """Sends a signal to a job's batch process alone.

    Raises:
        SlurmError: The job is gone, or another user's.
    """
    _run("scancel", "--batch", f"--signal={name}", job.name)


def cancel(job: QueuedJob) -> None:
    """Takes a job out of the queue.

    Raises:
        SlurmError: It is another user's.
    """
    _run("scancel", job.name)


def release(job: QueuedJob) -> None:
    """Lets a job that is held wait for nodes.

    Raises:
        SlurmError: An administrator holds it.
    """
    _run("scontrol", "release", job.name)


def _run(*arguments: str, stdin: str | None = None, folder: Path | None = None, prefix: str = "") -> str:
    try:
        done = subprocess.run(
            arguments,
            input=stdin or "",
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=_TIMEOUT_S,
            env=submitting_environment(os.environ),
            cwd=folder,
            check=False,
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"Slurm's {arguments[0]} is not on this machine",
            fix="log in where jobs are submitted, or try launch/minislurm; piip-scale train needs no Slurm",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{arguments[0]} did not answer within {_TIMEOUT_S:g} s") from error
    if done.returncode:
        reply = _reason(arguments[0], done.stderr) or f"exit code {done.returncode}"
        fix = "is this machine part of a cluster? SLURM_CONF may name its configuration"
        fix = fix if _NO_CLUSTER.search(done.stderr) else ""
        raise SlurmError(f"{prefix or ' '.join(arguments[:2])}: {reply}", fix=fix)
    # sbatch prints the outcome of a test on standard error.
    return done.stdout or done.stderr


def _reason(command: str, stderr: str) -> str:
    """What a command reports as wrong, on one line: the end of it where that is fatal, or else all."""
    lines = [line.removeprefix(f"{command}: ").removeprefix("error: ").strip() for line in stderr.splitlines()]
    fatal = [line.removeprefix("fatal: ") for line in lines if line.startswith("fatal: ")]
    return "; ".join(fatal or lines)
