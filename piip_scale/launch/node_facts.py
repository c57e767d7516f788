"""What one node reports before a training starts on it, and what is wrong with that."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from piip_scale.files import write_text_atomically
from piip_scale.run.reasons import COMMUNICATION

_GIB = 2**30
_MIN_FREE_DISK_GIB = 1.0
# The libraries of a rank with one loader worker, before there is a model.
_MIN_MEMORY_GIB_PER_RANK = 1.5
_MIN_FREE_GPU_SHARE = 0.9
# Below it, times that ranks compare across nodes still come in the right order.
_MAX_SKEW_S = 3.0
_COMPARED = {
    "gpus": "GPUs",
    "driver": "driver",
    "nccl": "NCCL",
    "torch": "torch",
    "python": "Python",
    "package": "piip-scale",
}


@dataclass(frozen=True)
class GpuFacts:
    """One GPU of a node.

    Attributes:
        name: Its model.
        free_bytes: Memory that nobody uses.
        total_bytes: Its memory.
        error: What happened when it was to compute; empty where the result was right.
    """

    name: str
    free_bytes: int
    total_bytes: int
    error: str = ""


@dataclass(frozen=True)
class Reduction:
    """A sum over all nodes whose result is known.

    Attributes:
        error: What went wrong; empty where the result was right.
        gib_s: Bus bandwidth: bytes that each node sent and received, over the time.
    """

    error: str = ""
    gib_s: float = 0.0


@dataclass(frozen=True)
class NodeFacts:
    """What a node reports.

    Attributes:
        node: Slurm's name of it.
        unix_time_s: Its clock at the report.
        versions: By the names of ``_COMPARED``.
        gpus: Those visible to the job.
        free_disk_bytes: By folder that ranks write to on the node.
        disk_errors: Folders that cannot be written, with the reason.
        memory_bytes: Memory that is available.
        data_error: Why config or shards cannot be read there; empty where they can.
        data_reason: The kind of that error.
        reduction: The sum over all nodes; ``None`` before it.
    """

    node: str
    unix_time_s: float
    versions: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[GpuFacts, ...] = ()
    free_disk_bytes: Mapping[str, int] = field(default_factory=dict)
    disk_errors: tuple[str, ...] = ()
    memory_bytes: int = 0
    data_error: str = ""
    data_reason: str = ""
    reduction: Reduction | None = None


@dataclass(frozen=True)
class Needs:
    """What a training needs of each node.

    Attributes:
        ranks_per_node: Ranks on it.
        gpus_per_node: GPUs, 0 on a cluster without.
    """

    ranks_per_node: int
    gpus_per_node: int


@dataclass(frozen=True)
class Answer:
    """A node's facts with the supervisor's clock around them.

    Attributes:
        facts: What it reported.
        asked_unix_s: When the question was sent.
        seen_unix_s: When the answer was there.
    """

    facts: NodeFacts
    asked_unix_s: float
    seen_unix_s: float


def problems_of_nodes(
    nodes: Sequence[str], answers: Mapping[str, Answer], needs: Needs, bound_s: float
) -> dict[str, str]:
    """What is wrong with each node that cannot train; a node that nothing is wrong with is left out.

    What a node has of its own comes first: a sum over all nodes fails on each where one of them is sick.

    Args:
        nodes: Those that were asked.
        answers: By node; one without is missing.
        needs: What the training needs.
        bound_s: How long they had.
    """
    found = {node: f"did not answer within {bound_s:.0f} s" for node in nodes if node not in answers}
    own = _problems_by_node(answers, needs)
    is_shared = all(answer.facts.data_error for node, answer in answers.items() if node not in own)
    for node, answer in answers.items():
        problems = list(own.get(node, []))
        if answer.facts.data_error and not is_shared:
            problems.append(answer.facts.data_error)
        if problems:
            found[node] = "; ".join(problems)
    unable = {} if found else _unable(answers)
    # Where most could not, it takes more than this to find who is to blame.
    blamed = unable if 2 * len(unable) < len(answers) else {}
    return found | {node: f"all-reduce: {error}" for node, error in blamed.items()}


def _problems_by_node(answers: Mapping[str, Answer], needs: Needs) -> dict[str, list[str]]:
    odd = odd_versions({node: answer.facts.versions for node, answer in answers.items()})
    found = {
        node: [*own_problems(answer.facts, needs), *clock_problems(answer), *odd.get(node, [])]
        for node, answer in answers.items()
    }
    return {node: problems for node, problems in found.items() if problems}


def own_problems(facts: NodeFacts, needs: Needs) -> list[str]:
    """What is wrong with a node by itself."""
    # Where none were asked for and there are some, the node was given whole: each rank takes one.
    wanted_gpus = needs.gpus_per_node or (needs.ranks_per_node if facts.gpus else 0)
    found = _gpu_problems(facts.gpus, wanted_gpus) if wanted_gpus else []
    found += facts.disk_errors
    for folder, free in facts.free_disk_bytes.items():
        if free < _MIN_FREE_DISK_GIB * _GIB:
            found.append(f"{folder} has {free / _GIB:.2f} GiB free, {_MIN_FREE_DISK_GIB:g} are needed")
    wanted = needs.ranks_per_node * _MIN_MEMORY_GIB_PER_RANK
    if facts.memory_bytes < wanted * _GIB:
        found.append(f"{facts.memory_bytes / _GIB:.1f} GiB of memory are available, {wanted:g} are needed")
    return found


def _gpu_problems(gpus: Sequence[GpuFacts], num_wanted: int) -> list[str]:
    found = [] if len(gpus) >= num_wanted else [f"{len(gpus)} GPUs are visible, {num_wanted} are needed"]
    for index, gpu in enumerate(gpus):
        if gpu.error:
            found.append(f"GPU {index} ({gpu.name}): {gpu.error}")
        elif gpu.free_bytes < _MIN_FREE_GPU_SHARE * gpu.total_bytes:
            free, total = gpu.free_bytes / _GIB, gpu.total_bytes / _GIB
            found.append(f"GPU {index} ({gpu.name}) is in use: {free:.1f} of {total:.1f} GiB are free")
    return found


def clock_problems(answer: Answer) -> list[str]:
    """Whether a node's clock lies outside of the time in which it answered."""
    time_s = answer.facts.unix_time_s
    skew_s = min(time_s - answer.asked_unix_s, 0.0) + max(time_s - answer.seen_unix_s, 0.0)
    if abs(skew_s) <= _MAX_SKEW_S:
        return []
    direction = "ahead" if skew_s > 0 else "behind"
    return [f"its clock is at least {abs(skew_s):.0f} s {direction}; {_MAX_SKEW_S:g} s are allowed"]


def odd_versions(versions: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Nodes whose versions differ from those of most, with the difference."""
    found: dict[str, list[str]] = {}
    for key, name in _COMPARED.items():
        of_node = {node: facts.get(key, "") for node, facts in versions.items()}
        # Of two that are as frequent, the one of the first node by name counts.
        ranked = Counter(of_node[node] for node in sorted(of_node)).most_common()
        for node, version in of_node.items():
            if version != ranked[0][0]:
                most = ranked[0][0] or "none"
                found.setdefault(node, []).append(f"{name} {version or 'none'}, most nodes have {most}")
    return found


def shared_problem(answers: Mapping[str, Answer], sick: Collection[str] = ()) -> tuple[str, str] | None:
    """Kind and line of what no node is to blame for: config or shards on every node, the sum on half of them.

    Args:
        answers: By node.
        sick: Nodes that are to blame for something, or did not answer: they count for nothing here.
    """
    well = {node: answer for node, answer in answers.items() if node not in sick}
    reports = [(answer.facts.data_reason, answer.facts.data_error) for answer in well.values()]
    if reports and all(line for _, line in reports):
        return reports[0]
    # The sum was over the sick ones too.
    unable = {} if sick else _unable(answers)
    if unable and 2 * len(unable) >= len(answers):
        node, error = min(unable.items())
        return COMMUNICATION, f"all-reduce on {len(unable)} of {len(answers)} nodes, {node} for one: {error}"
    return None


def _unable(answers: Mapping[str, Answer]) -> dict[str, str]:
    """Nodes that the sum over all of them failed on, or did not come back on."""
    reductions = {node: answer.facts.reduction for node, answer in answers.items()}
    if len(answers) == 1:
        return {}
    return {
        node: one.error if one else "it brought no result" for node, one in reductions.items() if not one or one.error
    }


def summary(answers: Mapping[str, Answer], needs: Needs) -> str:
    """Healthy nodes in one line."""
    facts = [answer.facts for answer in answers.values()]
    least = min((len(one.gpus) for one in facts), default=0)
    gpus = f"{least} GPUs each, not asked for" if least else "no GPUs asked for, none looked at"
    gpus = f"{needs.gpus_per_node} GPUs each" if needs.gpus_per_node else gpus
    speeds: list[float] = [one.reduction.gib_s for one in facts if one.reduction]
    reduced = (
        f"all-reduce right, {min(speeds):.2f} GiB/s" if speeds and min(speeds) > 0 else "no all-reduce among one node"
    )
    memory = min(one.memory_bytes for one in facts) / _GIB
    disk = min((free for one in facts for free in one.free_disk_bytes.values()), default=0) / _GIB
    return f"{gpus}; {reduced}; at least {memory:.1f} GiB of memory and {disk:.1f} GiB of local disk free"


def save_facts(folder: Path, facts: NodeFacts) -> None:
    """Writes a node's facts where the supervisor looks.

    Raises:
        OSError: The disk refuses.
    """
    write_text_atomically(folder / f"{facts.node}.json", json.dumps(asdict(facts)))


def load_facts(folder: Path) -> dict[str, NodeFacts]:
    """The facts that are there, by node."""
    found = {}
    for path in folder.glob("*.json"):
        with suppress(OSError, ValueError, TypeError, KeyError):
            facts = _read(json.loads(path.read_text(encoding="utf-8")))
            found[facts.node] = facts
    return found


def _read(values: dict[str, Any]) -> NodeFacts:
    known = {one.name for one in fields(NodeFacts)}
    values = {key: value for key, value in values.items() if key in known}
    values["gpus"] = tuple(GpuFacts(**gpu) for gpu in values["gpus"])
    values["disk_errors"] = tuple(values["disk_errors"])
    values["reduction"] = Reduction(**values["reduction"]) if values["reduction"] else None
    return NodeFacts(**values)
