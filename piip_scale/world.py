"""Who this process is among all: the only reader of RANK, SLURM_* and their like."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from piip_scale.errors import WorldError

_MAX_PORT = 65535
# Below the ports that Linux gives to outgoing connections, which begin at 32768.
_FIRST_PORT, _NUM_PORTS, _PORTS_PER_JOB = 12000, 20000, 8


@dataclass(frozen=True)
class World:
    """Ranks and nodes of one training, as seen by one process.

    Attributes:
        rank: Index of this process among all, 0-based.
        num_ranks: Processes in all.
        local_rank: Index of this process on its node.
        ranks_per_node: Processes on this node; other nodes may have more or fewer.
        master_address: Host of rank 0.
        master_port: Port at which the ranks meet.
        launcher: Who started the process: ``single``, ``torchrun`` or ``slurm``.
        node_rank: Index of this process's node.
    """

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    ranks_per_node: int = 1
    master_address: str = "127.0.0.1"
    master_port: int = 29500
    launcher: str = "single"
    node_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise WorldError("rank out of range", value=self.rank, rule=f"0 <= rank < {self.num_ranks}")
        if not 0 <= self.local_rank < self.ranks_per_node <= self.num_ranks:
            raise WorldError(
                "local rank out of range",
                value=self.local_rank,
                rule=f"0 <= local rank < {self.ranks_per_node} ranks per node <= {self.num_ranks} ranks",
            )
        if not 1 <= self.master_port <= _MAX_PORT:
            raise WorldError("master port out of range", value=self.master_port, rule=f"1 <= port <= {_MAX_PORT}")

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes what only one rank may write."""
        return self.rank == 0

    def as_environment(self) -> dict[str, str]:
        """The variables torch.distributed's ``env://`` rendezvous and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


def read_world(environment: Mapping[str, str] | None = None) -> World:
    """Reads the world from torchrun's or Slurm's variables; alone where neither is set.

    torchrun's come first: inside ``srun torchrun ...`` both are there. But images for containers set some of them for
    each task of Slurm's (enroot's hook for PyTorch: RANK, LOCAL_RANK, and WORLD_SIZE from the job's tasks rather than
    the step's). Those are no launcher's: Slurm's own variables count then.

    Args:
        environment: Variables to read instead of the process's own.

    Raises:
        WorldError: A variable is missing beside its siblings, or cannot be meant.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and not _is_named_by_slurm(env):
        return _torchrun_world(env)
    # Seen on Slurm 22.05: a batch script has SLURM_PROCID=0 too, but only srun's tasks have SLURM_STEP_ID. A step of
    # one task is a shell (srun --pty, salloc) or a single process, and may start ranks of its own.
    if "SLURM_STEP_ID" in env and _integer(env, "SLURM_STEP_NUM_TASKS") > 1:
        return _slurm_world(env)
    return World()


def claimed_rank(environment: Mapping[str, str] | None = None) -> int | None:
    """The rank whose last words a process may speak, also where its world does not add up; ``None`` for one alone.

    Args:
        environment: Variables to read instead of the process's own.
    """
    env = os.environ if environment is None else environment
    try:
        world = read_world(env)
    except WorldError:
        named = (env.get(name, "") for name in ("RANK", "SLURM_PROCID"))
        return next((int(text) for text in named if text.isdecimal()), 0)
    return None if world.num_ranks == 1 else world.rank


def _is_named_by_slurm(env: Mapping[str, str]) -> bool:
    """Whether RANK is only another name of srun's task, whoever set it."""
    # torchrun, and launchers in its manner, say how many ranks a node has; hooks do not.
    return "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and "LOCAL_WORLD_SIZE" not in env


def _torchrun_world(env: Mapping[str, str]) -> World:
    rank, ranks_per_node = _integer(env, "RANK"), _integer(env, "LOCAL_WORLD_SIZE")
    return World(
        rank=rank,
        num_ranks=_integer(env, "WORLD_SIZE"),
        local_rank=_integer(env, "LOCAL_RANK"),
        ranks_per_node=ranks_per_node,
        master_address=_text(env, "MASTER_ADDR"),
        master_port=_integer(env, "MASTER_PORT"),
        launcher="torchrun",
        # Launchers in torchrun's manner that leave it out fill nodes evenly, in order.
        node_rank=_integer(env, "GROUP_RANK") if "GROUP_RANK" in env else rank // max(ranks_per_node, 1),
    )


def _slurm_world(env: Mapping[str, str]) -> World:
    """One task of an ``srun`` step.

    SLURM_NTASKS_PER_NODE is there only when ``--ntasks-per-node`` was asked for, and SLURM_NTASKS and
    SLURM_TASKS_PER_NODE are, in a batch job, the job's and not the step's; so only the step's own are read.
    """
    node_rank = _integer(env, "SLURM_NODEID")
    return World(
        rank=_integer(env, "SLURM_PROCID"),
        num_ranks=_integer(env, "SLURM_STEP_NUM_TASKS"),
        local_rank=_integer(env, "SLURM_LOCALID"),
        ranks_per_node=_tasks_of_node(_text(env, "SLURM_STEP_TASKS_PER_NODE"), node_rank),
        master_address=_text(env, "MASTER_ADDR"),
        master_port=_integer(env, "MASTER_PORT"),
        launcher="slurm",
        node_rank=node_rank,
    )


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave to a job, as its batch process sees it.

    Attributes:
        job_id: The job; a task of an array has one of its own.
        restart_count: How often the job was requeued.
        node_list: Its nodes as Slurm writes them: ``n[1-3,7]``.
        num_nodes: How many they are.
        this_node: The node of this process.
        tasks_per_node: As the job asked; ``None`` where it did not.
        cpus_per_task: Likewise.
        gpus_per_node: GPUs of this node that are the job's.
        array_task: Index of the task in its array; ``None`` outside of one.
        array_job: Number of the array, which is also the own one of its last task; ``None`` outside of one.
    """

    job_id: int
    restart_count: int
    node_list: str
    num_nodes: int
    this_node: str
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    gpus_per_node: int = 0
    array_task: int | None = None
    array_job: int | None = None

    @property
    def name(self) -> str:
        """The job as Slurm's commands must call it: the number of a task may be that of its whole array."""
        is_task = self.array_job is not None and self.array_task is not None
        return f"{self.array_job}_{self.array_task}" if is_task else str(self.job_id)


def read_allocation(environment: Mapping[str, str] | None = None) -> Allocation | None:
    """Reads the allocation from Slurm's variables; ``None`` outside of one.

    Args:
        environment: Variables to read instead of the process's own.

    Raises:
        WorldError: A variable is missing beside its siblings, or cannot be meant.
    """
    env = os.environ if environment is None else environment
    if "SLURM_JOB_ID" not in env:
        return None
    return Allocation(
        job_id=_integer(env, "SLURM_JOB_ID"),
        restart_count=_optional(env, "SLURM_RESTART_COUNT") or 0,
        node_list=_text(env, "SLURM_JOB_NODELIST"),
        num_nodes=_integer(env, "SLURM_JOB_NUM_NODES"),
        this_node=node_name(env),
        tasks_per_node=_optional(env, "SLURM_NTASKS_PER_NODE"),
        cpus_per_task=_optional(env, "SLURM_CPUS_PER_TASK"),
        gpus_per_node=_optional(env, "SLURM_GPUS_ON_NODE") or 0,
        array_task=_optional(env, "SLURM_ARRAY_TASK_ID"),
        array_job=_optional(env, "SLURM_ARRAY_JOB_ID"),
    )


def node_name(environment: Mapping[str, str] | None = None) -> str:
    """Slurm's name of this machine, which is what it wants to hear of it; the host's own outside of a job."""
    env = os.environ if environment is None else environment
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def usable_cores() -> int:
    """Cores that this process may use: of a node's, those that its launcher or scheduler bound it to."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def outside_of_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for a command that must not take this process's job for its own, as one that submits another."""
    stays = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {name: value for name, value in environment.items() if name in stays or not name.startswith("SLURM")}


def plain_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for Slurm's commands whose output is read: none that hides jobs, asks back, or writes times anew."""
    # What people set for their own eyes: filters of squeue and its like, questions of scancel, the form of times.
    own = ("SQUEUE_", "SCANCEL_", "SCONTROL_", "SACCT_", "SINFO_", "SLURM_TIME_FORMAT", "SLURM_BITSTR_LEN")
    return {name: value for name, value in environment.items() if not name.startswith(own)}


def step_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for an ``srun`` whose options say how many tasks, nodes and cores its step has.

    What sbatch leaves for srun of the whole job would contradict them: the GPUs of all nodes in a step on some, and the
    cores of a task once more (``srun: fatal: cpus_per_task set by two different environment variables``).
    """
    dropped = {"SLURM_GPUS", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE"}
    if "cpu" in environment.get("SLURM_TRES_PER_TASK", ""):
        dropped.add("SLURM_CPUS_PER_TASK")
    return {name: value for name, value in environment.items() if name not in dropped}


def given_meeting_point(names: Collection[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Where the ranks meet, as far as a site says so itself.

    Args:
        names: Variables that the site sets; others that are there may be left from the shell that submitted.
        environment: The job's.
    """
    own = ("MASTER_ADDR", "MASTER_PORT")
    return {name: environment[name] for name in own if name in names and environment.get(name)}


def rendezvous_port(job_id: int, attempt: int) -> int:
    """Where the ranks of a job's attempt meet: no two jobs of a node, and no two attempts in a row, share one."""
    job = job_id % (_NUM_PORTS // _PORTS_PER_JOB)
    return _FIRST_PORT + job * _PORTS_PER_JOB + attempt % _PORTS_PER_JOB


@contextmanager
def held_port() -> Iterator[int]:
    """A port where ranks of this machine can meet, which the system gives nobody else while the context lasts."""
    with socket.socket() as held:
        # Rank 0's store sets it too, and so may listen where this one is bound and does not listen.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("", 0))
        yield held.getsockname()[1]


def _tasks_of_node(text: str, node: int) -> int:
    """Reads Slurm's ``2(x3),1``: three nodes of two tasks, then one node of one."""
    begin = 0
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            break
        begin += int(match[2] or 1)
        if node < begin:
            return int(match[1])
    raise WorldError(
        "environment variable SLURM_STEP_TASKS_PER_NODE",
        value=text,
        rule=f"it reads like 2(x3),1 and names node {node}, counted from 0",
        fix="start the ranks with srun",
    )


def _text(env: Mapping[str, str], name: str) -> str:
    if name not in env:
        raise WorldError(
            f"environment variable {name} is not set",
            rule="whoever starts the ranks sets it: torchrun, or the batch script around srun",
            fix="start with one of them, or unset RANK (leave srun) for a single process",
        )
    return env[name]


def _integer(env: Mapping[str, str], name: str) -> int:
    text = _text(env, name)
    try:
        return int(text)
    except ValueError:
        raise WorldError(f"environment variable {name}", value=text, rule="it must be a whole number") from None


def _optional(env: Mapping[str, str], name: str) -> int | None:
    return _integer(env, name) if env.get(name) else None
