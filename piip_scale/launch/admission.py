"""Whether Slurm takes a job: at once, once nodes are back in service, or never."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from piip_scale.errors import SlurmError
from piip_scale.launch import queue
from piip_scale.launch.limits import check_lead, site_limits
from piip_scale.launch.node_lists import expand_nodes
from piip_scale.launch.options import OptionValue, first_only_words
from piip_scale.launch.slurm_records import NodeRecord, PartitionRecord, usable_nodes
from piip_scale.launch.spec import JobSpec

# What sbatch --test-only says of nodes that are drained or down, as of those that are not there at all: to sbatch
# itself the first are a reason to wait. Seen on Slurm 22.05.
_NOT_NOW = (
    "Requested node configuration is not available",
    "Required node not available",
    "Requested nodes are busy",
    "Nodes required for job are DOWN",
)


def check_admission(script: str, spec: JobSpec, options: Mapping[str, OptionValue]) -> list[str]:
    """Asks Slurm whether it would take a job, without submitting it; returns what is worth a line for its user.

    Args:
        script: The batch script's text.
        spec: The job; of a sweep one of its runs.
        options: Of the job.

    Raises:
        SlurmError: Slurm would refuse it, or never start it.
        ConfigError: A time limit that the site sets leaves no time to save.
    """
    partitions = queue.partitions()
    qos = {str(options.get("qos", "")), *(one.qos for one in partitions)} - {""}
    check_lead(site_limits(options, partitions, queue.qos_limits_s(sorted(qos))), spec.signal_lead_s)
    try:
        queue.check_submission(script, spec.working_dir, first_only_words(options))
    except SlurmError as error:
        if not any(text in error.problem for text in _NOT_NOW):
            raise
        note = waiting_note(queue.nodes(), partitions, spec, options)
        if not note:
            raise
        return [note]
    return []


def waiting_note(
    nodes: Iterable[NodeRecord],
    partitions: Iterable[PartitionRecord],
    spec: JobSpec,
    options: Mapping[str, OptionValue],
) -> str:
    """Which nodes that are out of service a job will wait for; empty where they would not help it.

    Args:
        nodes: All of the cluster.
        partitions: All of the cluster.
        spec: The job.
        options: Of the job.
    """
    names = str(options.get("partition", "")).split(",")
    own = [one.name for one in partitions if (one.is_default if names == [""] else one.name in names)]
    excluded = expand_nodes(str(options.get("exclude", "")))
    required = expand_nodes(str(options.get("nodelist", "")))
    fit = usable_nodes(nodes, own, str(options.get("constraint", "")), spec.ranks_per_node, spec.gpus_per_node)
    fit = [node for node in fit if node.name not in excluded]
    away = [node for node in fit if node.is_lost or node.is_doubtful]
    missed = [node for node in away if node.name in required] or away
    if len(fit) < spec.nodes_to_ask or not away or not set(required) <= {node.name for node in fit}:
        return ""
    listed = ", ".join(f"{node.name} ({node.line.removeprefix('Slurm calls it ')})" for node in missed[:4])
    more = f" and {len(missed) - 4} more" if len(missed) > 4 else ""
    return f"the job will wait: it needs {spec.nodes_to_ask} nodes, and out of service are {listed}{more}"
