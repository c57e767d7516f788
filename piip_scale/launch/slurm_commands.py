"""Slurm's commands, typed: each call is one process, and each refusal one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

from piip_scale.errors import SlurmError
from piip_scale.launch.node_lists import expand_nodes
from piip_scale.launch.slurm_records import (
    JobRecord,
    NodeRecord,
    PartitionRecord,
    parse_job,
    parse_nodes,
    parse_partitions,
)
from piip_scale.launch.time_left import USUAL_KILL_WAIT_S
from piip_scale.world import plain_environment

_TIMEOUT_S = 90.0
_TRIES, _PAUSE_S = 30, 10.0
# What a controller that is being restarted, or is busy, makes of a command.
_UNREACHABLE = ("Unable to contact slurm controller", "Socket timed out", "Zero Bytes were transmitted")


class Slurm:
    """The commands; a controller that does not answer at once is asked again for some minutes.

    Args:
        environment: For the commands; this process's own where ``None``.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = plain_environment(os.environ if environment is None else environment)

    def hostnames(self, node_list: str) -> tuple[str, ...]:
        """The nodes of a list such as ``n[1-3,7]``, in order."""
        return tuple(self._run("scontrol", "show", "hostnames", node_list).split()) if node_list else ()

    def job(self, job: str | int) -> JobRecord:
        """What the controller knows of a job.

        Args:
            job: ``12``, or ``12_3`` for a task of an array.

        Raises:
            SlurmError: It knows none, or does not answer.
        """
        return parse_job(self._run("scontrol", "show", "job", "-o", str(job)), str(job))

    def job_now(self, job: str | int) -> JobRecord:
        """As ``job``, asked once: for who asks again soon, and has to look after something meanwhile.

        Raises:
            SlurmError: The controller does not answer, or knows none.
        """
        return parse_job(_run_once(("scontrol", "show", "job", "-o", str(job)), self._environment), str(job))

    def nodes(self, names: Sequence[str]) -> dict[str, NodeRecord]:
        """What the controller knows of nodes, by name."""
        return parse_nodes(self._run("scontrol", "show", "node", "-o", ",".join(names))) if names else {}

    def all_nodes(self) -> dict[str, NodeRecord]:
        """What the controller knows of every node, by name."""
        return parse_nodes(self._run("scontrol", "show", "node", "-o"))

    def partitions(self) -> list[PartitionRecord]:
        """What the controller knows of the partitions."""
        return parse_partitions(self._run("scontrol", "show", "partition", "-o"))

    def reserved_nodes(self, reservation: str) -> tuple[str, ...]:
        """The nodes of a reservation."""
        shown = self._run("scontrol", "show", "reservation", "-o", reservation)
        nodes = re.search(r"\bNodes=(\S*)", shown)
        return expand_nodes(nodes[1]) if nodes else ()

    def kill_wait_s(self) -> float:
        """How long the processes of a job have from Slurm's TERM to its KILL."""
        found = re.search(r"^KillWait\s*=\s*(\d+)", self._run("scontrol", "show", "config"), re.MULTILINE)
        return float(found[1]) if found else USUAL_KILL_WAIT_S

    def requeue(self, job: str | int) -> None:
        """Puts a job back into the queue; its processes have Slurm's KillWait from then on.

        Args:
            job: ``12``, or ``12_3``: the number of an array alone would requeue all its tasks.

        Raises:
            SlurmError: Slurm does not let it.
        """
        self._run("scontrol", "requeue", str(job))

    def restrict(self, job: str | int, excluded: Sequence[str], required: Sequence[str] | None = None) -> None:
        """Sets the nodes that a waiting job must not get, and those that it must get, in place of those before.

        Args:
            job: ``12``, or ``12_3``.
            excluded: Nodes.
            required: Nodes; as they are where ``None``.

        Raises:
            SlurmError: Slurm does not let it, as when the job does not wait.
        """
        # Together: a node on both lists would be refused.
        lists = [f"ExcNodeList={','.join(excluded)}"]
        lists += [] if required is None else [f"ReqNodeList={','.join(required)}"]
        self._run("scontrol", "update", f"JobId={job}", *lists)

    def signal_step(self, job: str | int, step_id: int, number: int) -> None:
        """Sends a signal to all processes of a step."""
        self._run("scancel", f"--signal={number}", f"{job}.{step_id}")

    def successors(self, job: str | int, name: str) -> list[str]:
        """Waiting jobs of this user and of a name that start when a job ends.

        Args:
            job: ``12``, or ``12_3``: then of a following array the task of the same index.
            name: Of the job.
        """
        words = ["squeue", "--noheader", "--me", "--array", "--states=PENDING", "--format=%F|%K|%E|%j"]
        return parse_successors(self._run(*words), str(job), name)

    def cancel(self, jobs: Sequence[str | int]) -> None:
        """Takes jobs out of the queue."""
        if jobs:
            self._run("scancel", *map(str, jobs))

    def step_ids(self, job: str | int) -> list[int]:
        """The steps that a job runs now, without its batch process."""
        listed = self._run("squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i").split()
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
            encoding="utf-8",
            errors="surrogateescape",
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
        reply = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise SlurmError(f"{' '.join(words[:3])}: {reply}")
    return done.stdout


def parse_successors(text: str, job: str, name: str) -> list[str]:
    """The jobs of a name that wait for a job, from lines of array, task, dependencies and name."""
    array, _, task = job.partition("_")
    # Slurm writes afterany:12 or, where the jobs are of arrays, afterany:12_* and afterany:12_3.
    tasks = rf"\*|{task}" if task else r"\*"
    own = re.compile(rf"(?<![\d_]){array}(?:_(?:{tasks}))?(?![\d_])")
    found = []
    for row in (line.split("|", 3) for line in text.splitlines()):
        if len(row) != 4 or row[3] != name or not own.search(row[2]):
            continue
        if not task or row[1] in (task, "N/A"):
            found.append(f"{row[0]}_{row[1]}" if row[1].isdecimal() else row[0])
    return found


def _outlive_the_end() -> None:
    """Once a job is requeued, Slurm signals all its processes, also the command that then names nodes to exclude."""
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
