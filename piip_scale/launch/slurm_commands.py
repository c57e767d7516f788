"""Slurm's commands, typed: each call is one process, and each refusal one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from piip_scale.errors import SlurmError

_TIMEOUT_S = 90.0
_TRIES, _PAUSE_S = 30, 10.0
# What a controller that is being restarted, or is busy, makes of a command.
_UNREACHABLE = ("Unable to contact slurm controller", "Socket timed out", "Zero Bytes were transmitted")
_LOST = {"DOWN", "FAIL", "FAILING", "NOT_RESPONDING", "POWERED_DOWN", "POWERING_DOWN", "REBOOT"}
_DOUBTFUL = {"DRAIN", "DRAINING", "DRAINED", "MAINT"}


@dataclass(frozen=True)
class JobRecord:
    """What the controller knows of a job.

    Attributes:
        job_id: The job.
        state: ``RUNNING``, ``PENDING``, ``COMPLETING`` ...
        restarts: How often it was requeued, with a requeueing that is under way.
        node_list: Nodes that it has now, as Slurm writes them; a lost one is no longer among them.
        is_preempted: Another job waits for its nodes.
        run_s: How long it runs.
        limit_s: How long it may; ``None`` without a limit.
        partition: Its partition.
        reason: Why it waits, in Slurm's words.
    """

    job_id: int
    state: str
    restarts: int
    node_list: str
    is_preempted: bool
    run_s: int
    limit_s: int | None
    partition: str
    reason: str


@dataclass(frozen=True)
class NodeRecord:
    """What the controller knows of a node.

    Attributes:
        name: Slurm's name of it.
        address: Where Slurm reaches it.
        states: Its state's parts, ``ALLOCATED`` and ``DRAIN`` for instance.
        reason: Why it is in that state, where an administrator or a health check said so.
    """

    name: str
    address: str
    states: frozenset[str]
    reason: str = ""

    @property
    def is_lost(self) -> bool:
        """Nothing can be started there."""
        return bool(self.states & _LOST)

    @property
    def is_doubtful(self) -> bool:
        """It runs, and somebody wants it emptied."""
        return bool(self.states & _DOUBTFUL)

    @property
    def line(self) -> str:
        """State and reason for people."""
        state = "+".join(sorted(self.states)).lower()
        return f"Slurm calls it {state}" + (f" ({self.reason})" if self.reason else "")


def parse_job(text: str) -> JobRecord:
    """Reads ``scontrol show job -o``.

    Raises:
        SlurmError: It is none.
    """
    fields = _fields(text)
    try:
        return JobRecord(
            job_id=int(fields["JobId"]),
            state=fields["JobState"],
            restarts=int(fields["Restarts"]),
            node_list=fields.get("NodeList", "(null)").replace("(null)", ""),
            is_preempted=fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A"),
            run_s=parse_duration(fields["RunTime"]) or 0,
            limit_s=parse_duration(fields["TimeLimit"]),
            partition=fields.get("Partition", "").split(",")[0],
            reason=fields.get("Reason", ""),
        )
    except (KeyError, ValueError) as error:
        raise SlurmError(f"cannot read what scontrol tells of a job ({error})", value=text[:200]) from error


def parse_nodes(text: str) -> dict[str, NodeRecord]:
    """Reads ``scontrol show node -o``, one node a line; by name."""
    records = {}
    for fields in map(_fields, text.splitlines()):
        if "NodeName" not in fields:
            continue
        state = fields.get("State", "UNKNOWN")
        states = set(re.sub(r"[^A-Z_+]", "", state).split("+")) | ({"NOT_RESPONDING"} if "*" in state else set())
        name = fields["NodeName"]
        reason = re.search(r"\bReason=(.*?)(?: \[\S+\])?$", fields[""])
        told = reason[1].strip() if reason else ""
        records[name] = NodeRecord(name, fields.get("NodeAddr", name), frozenset(states), told)
    return records


def parse_duration(text: str) -> int | None:
    """Seconds of Slurm's ``1-02:03:04`` or ``02:03:04``; ``None`` for one without end.

    Raises:
        ValueError: It is none.
    """
    if text in ("UNLIMITED", "INFINITE", "Partition_Limit", "INVALID", "NOT_SET"):
        return None
    days, _, clock = text.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = seconds * 60 + int(part)
    return int(days or 0) * 86400 + seconds


def _fields(text: str) -> dict[str, str]:
    return {"": text.strip()} | dict(re.findall(r"(?:^|\s)([A-Za-z/:]+)=(\S*)", text))


class Slurm:
    """The commands; a controller that does not answer at once is asked again for some minutes.

    Args:
        environment: For the commands; this process's own where ``None``.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(os.environ if environment is None else environment)

    def hostnames(self, node_list: str) -> tuple[str, ...]:
        """The nodes of a list such as ``n[1-3,7]``, in order."""
        return tuple(self._run("scontrol", "show", "hostnames", node_list).split()) if node_list else ()

    def job(self, job_id: int) -> JobRecord:
        """What the controller knows of a job.

        Raises:
            SlurmError: It knows none, or does not answer.
        """
        return parse_job(self._run("scontrol", "show", "job", "-o", str(job_id)))

    def nodes(self, names: Sequence[str]) -> dict[str, NodeRecord]:
        """What the controller knows of nodes, by name."""
        return parse_nodes(self._run("scontrol", "show", "node", "-o", ",".join(names))) if names else {}

    def requeue(self, job_id: int) -> None:
        """Puts a job back into the queue; its processes have Slurm's KillWait from then on.

        Raises:
            SlurmError: Slurm does not let it.
        """
        self._run("scontrol", "requeue", str(job_id))

    def exclude(self, job_id: int, nodes: Sequence[str]) -> None:
        """Keeps a waiting job from nodes.

        Raises:
            SlurmError: Slurm does not let it, as when the job does not wait.
        """
        self._run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}")

    def signal_step(self, job_id: int, step_id: int, number: int) -> None:
        """Sends a signal to all processes of a step."""
        self._run("scancel", f"--signal={number}", f"{job_id}.{step_id}")

    def successors(self, job_id: int, name: str) -> list[int]:
        """Waiting jobs of this user and of a name that start when a job ends."""
        listed = self._run("squeue", "--noheader", "--me", "--states=PENDING", "--format=%A|%E|%j").splitlines()
        rows = [line.split("|", 2) for line in listed]
        return sorted(int(row[0]) for row in rows if row[2] == name and re.search(rf"\b{job_id}\b", row[1]))

    def cancel(self, job_ids: Sequence[int]) -> None:
        """Takes jobs out of the queue."""
        if job_ids:
            self._run("scancel", *map(str, job_ids))

    def partition_size(self, name: str) -> int:
        """How many nodes a partition has."""
        return int(_fields(self._run("scontrol", "show", "partition", "-o", name)).get("TotalNodes", 0))

    def step_ids(self, job_id: int) -> list[int]:
        """The steps that a job runs now, without its batch process."""
        listed = self._run("squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i").split()
        return sorted(int(part) for part in (name.rpartition(".")[2] for name in listed) if part.isdigit())

    def _run(self, *words: str) -> str:
        for left in reversed(range(_TRIES)):
            try:
                return _run_once(words, self._environment)
            except SlurmError as error:
                if left == 0 or not any(text in error.problem for text in _UNREACHABLE):
                    raise
                time.sleep(_PAUSE_S)
        raise AssertionError("unreachable")


def _run_once(words: Sequence[str], environment: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env=dict(environment),
            check=False,
            preexec_fn=_outlive_the_end,
        )
    except FileNotFoundError as error:
        raise SlurmError(f"{words[0]} is not installed here", fix="load Slurm's commands into PATH") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{words[0]} did not answer within {_TIMEOUT_S:g} s") from error
    if done.returncode:
        told = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise SlurmError(f"{' '.join(words[:3])}: {told}")
    return done.stdout


def _outlive_the_end() -> None:
    """Once a job is requeued, Slurm signals all its processes, also the command that then names nodes to exclude."""
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
