"""What scontrol shows of jobs, nodes and partitions, as typed records. Pure functions.

Its output has no quotes. Texts of a user's own (a job's name, paths, comments) may hold blanks and ``KEY=VALUE``; so
the name is cut out, and of a key that stands there twice the first counts: the other texts come last.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

from piip_scale.errors import SlurmError
from piip_scale.launch.node_lists import expand_nodes

_LOST = {"DOWN", "FAIL", "FAILING", "NOT_RESPONDING", "POWERED_DOWN", "POWERING_DOWN", "REBOOT"}
_DOUBTFUL = {"DRAIN", "DRAINING", "DRAINED", "MAINT"}
_ABSENT = ("(null)", "N/A", "None", "Unknown")
_ENDLESS = ("", "UNLIMITED", "INFINITE", "Partition_Limit", "INVALID", "NOT_SET", "NONE")
_UNITS_S = (3600, 60, 1)
_JOB_NAME = re.compile(r" JobName=.*?(?= UserId=\S+\(\d+\) )")
_GPUS = re.compile(r"gpu(?::[^:,()]+)?:(\d+)")


@dataclass(frozen=True)
class JobRecord:
    """What the controller knows of a job.

    Attributes:
        job_id: The job; a task of an array that has begun has a number of its own.
        state: ``RUNNING``, ``PENDING``, ``COMPLETING`` ...
        restarts: How often it was requeued, with a requeueing that is under way.
        node_list: Nodes that it has now, as Slurm writes them; a lost one is no longer among them.
        is_preempted: Another job waits for its nodes.
        run_s: How long it runs.
        limit_s: How long it may; ``None`` without a limit.
        partitions: Those it may run in, or the one it runs in.
        reason: Why it waits, as Slurm names it.
        array_job: The array that it is a task of; ``None`` outside of one.
        array_tasks: Its index there as text; several of tasks that wait: ``0,2-5``.
        excluded: Nodes that it must not get.
        required: Nodes that it must get.
        features: What it asks of nodes, as ``--constraint`` has it.
        reservation: The reservation that it runs in; empty outside of one.
        deadline: When it must have ended, as Slurm writes it; empty without.
        end_unix_s: When it ended, or will at its limit; ``None`` where that is not known.
    """

    job_id: int
    state: str
    restarts: int
    node_list: str
    is_preempted: bool
    run_s: int
    limit_s: int | None
    partitions: tuple[str, ...]
    reason: str
    array_job: int | None = None
    array_tasks: str = ""
    excluded: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    features: str = ""
    reservation: str = ""
    deadline: str = ""
    end_unix_s: float | None = None

    @property
    def deadline_unix_s(self) -> float | None:
        """When it must have ended; ``None`` without."""
        return _moment(self.deadline)

    @property
    def partition(self) -> str:
        """The first of its partitions."""
        return self.partitions[0] if self.partitions else ""

    def is_called(self, name: str) -> bool:
        """Whether a name as commands take it, ``12`` or ``12_3``, is this job's and no other's."""
        return name == str(self.job_id) or name == f"{self.array_job}_{self.array_tasks}"


@dataclass(frozen=True)
class NodeRecord:
    """What the controller knows of a node.

    Attributes:
        name: Slurm's name of it.
        address: Where Slurm reaches it.
        states: Its state's parts, ``ALLOCATED`` and ``DRAIN`` for instance.
        reason: Why it is in that state, where an administrator or a health check gave one.
        partitions: Those it is in.
        features: What ``--constraint`` may ask for.
        num_cpus: Cores; 0 where that is not known.
        num_gpus: GPUs.
    """

    name: str
    address: str
    states: frozenset[str]
    reason: str = ""
    partitions: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    num_cpus: int = 0
    num_gpus: int = 0

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


@dataclass(frozen=True)
class PartitionRecord:
    """What the controller knows of a partition.

    Attributes:
        name: Its name.
        is_default: Jobs that name none run there.
        default_s: Time limit of a job that asks for none; ``None`` where that is the longest.
        longest_s: The longest time limit; ``None`` without.
        qos: The quality of service whose limits are the partition's; empty for none.
    """

    name: str
    is_default: bool
    default_s: int | None
    longest_s: int | None
    qos: str = ""


def parse_job(text: str, name: str = "") -> JobRecord:
    """Reads ``scontrol show job -o``, which shows all tasks of an array where its number is asked for.

    Args:
        text: What it shows.
        name: The job as commands take it, ``12`` or ``12_3``; empty where there is one alone.

    Raises:
        SlurmError: The job is not there, or this is something else.
    """
    records = [_parse_job(line) for line in text.splitlines() if "JobId=" in line]
    own = [record for record in records if record.is_called(name)] or (records if len(records) == 1 else [])
    if not own:
        shown = f"no job {name} among {len(records)}" if records else "no JobId"
        raise SlurmError(f"cannot read what scontrol shows of a job ({shown})", value=text[:200])
    return own[0]


def _parse_job(line: str) -> JobRecord:
    fields = _fields(_JOB_NAME.sub("", line, count=1))
    try:
        return JobRecord(
            job_id=int(fields["JobId"]),
            state=fields["JobState"],
            restarts=int(fields["Restarts"]),
            node_list=fields.get("NodeList", ""),
            is_preempted=bool(fields.get("PreemptTime")),
            run_s=parse_duration(fields["RunTime"]) or 0,
            limit_s=parse_duration(fields["TimeLimit"]),
            partitions=_list(fields.get("Partition", "")),
            reason=fields.get("Reason", ""),
            array_job=int(fields["ArrayJobId"]) if "ArrayJobId" in fields else None,
            array_tasks=fields.get("ArrayTaskId", ""),
            excluded=expand_nodes(fields.get("ExcNodeList", "")),
            required=expand_nodes(fields.get("ReqNodeList", "")),
            features=fields.get("Features", ""),
            reservation=fields.get("Reservation", ""),
            deadline=fields.get("Deadline", ""),
            end_unix_s=_moment(fields.get("EndTime", "")),
        )
    except (KeyError, ValueError) as error:
        raise SlurmError(f"cannot read what scontrol shows of a job ({error})", value=line[:200]) from error


def parse_nodes(text: str) -> dict[str, NodeRecord]:
    """Reads ``scontrol show node -o``, one node a line; by name."""
    records = {}
    for line in text.splitlines():
        fields = _fields(line)
        if "NodeName" not in fields:
            continue
        state = fields.get("State", "UNKNOWN")
        states = set(re.sub(r"[^A-Z_+]", "", state).split("+")) | ({"NOT_RESPONDING"} if "*" in state else set())
        reason = re.search(r"\bReason=(.*?)(?: \[\S+\])?$", line.strip())
        records[fields["NodeName"]] = NodeRecord(
            name=fields["NodeName"],
            address=fields.get("NodeAddr", fields["NodeName"]),
            states=frozenset(states),
            reason=reason[1].strip() if reason else "",
            partitions=_list(fields.get("Partitions", "")),
            features=_list(fields.get("ActiveFeatures", "")),
            num_cpus=_number(fields.get("CPUTot", "")),
            num_gpus=sum(int(match[1]) for match in _GPUS.finditer(fields.get("Gres", ""))),
        )
    return records


def parse_partitions(text: str) -> list[PartitionRecord]:
    """Reads ``scontrol show partition -o``, one partition a line."""
    lines = (_fields(line) for line in text.splitlines() if "PartitionName=" in line)
    return [
        PartitionRecord(
            name=fields["PartitionName"],
            is_default=fields.get("Default") == "YES",
            default_s=parse_duration(fields.get("DefaultTime", "")),
            longest_s=parse_duration(fields.get("MaxTime", "")),
            qos=fields.get("QoS", ""),
        )
        for fields in lines
    ]


def parse_duration(text: str) -> int | None:
    """Seconds of what Slurm shows as ``1-02:03:04`` or ``02:03:04``; ``None`` for one without end, or none yet.

    Raises:
        ValueError: It is none.
    """
    if text in _ENDLESS:
        return None
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    # After days, hours come first, however many follow; without days, seconds come last.
    units = _UNITS_S[: len(parts)] if dash else _UNITS_S[-len(parts) :]
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=True))


def _fields(line: str) -> dict[str, str]:
    """Keys and values, without those that stand for nothing."""
    found: dict[str, str] = {}
    for key, value in re.findall(r"(?:^|\s)([A-Za-z/:]+)=(\S*)", line):
        found.setdefault(key, "" if value in _ABSENT else value)
    return found


def _moment(text: str) -> float | None:
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def _list(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def usable_nodes(
    nodes: Iterable[NodeRecord], partitions: Iterable[str], features: str = "", num_cpus: int = 0, num_gpus: int = 0
) -> list[NodeRecord]:
    """The nodes that could ever be a job's: in its partitions, with its features, large enough; in service or not.

    Args:
        nodes: All of the cluster.
        partitions: Those that the job may run in.
        features: As ``--constraint`` has them; what is more than names joined by ``&`` or ``,`` is not judged.
        num_cpus: Cores that it needs of each.
        num_gpus: GPUs likewise.
    """
    names = set(re.split(r"[&,]", features)) if re.fullmatch(r"[\w.:&,-]+", features) else set()
    wanted = set(partitions)
    return [
        node
        for node in nodes
        if wanted & set(node.partitions)
        and names <= set(node.features)
        and (node.num_cpus == 0 or node.num_cpus >= num_cpus)
        and node.num_gpus >= num_gpus
    ]
