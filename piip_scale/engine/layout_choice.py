"""Which layout a run is sharded in, where its config leaves that to a plan."""

from __future__ import annotations

import math
import os

import torch
import torch.distributed as dist

from piip_scale.agreement import on_main
from piip_scale.config.run import RunConfig
from piip_scale.engine.checkpoint_choice import device_bytes, planner_on
from piip_scale.engine.gpus import DEFAULT_GPU, GPUS, gpu_of_device
from piip_scale.engine.planning.choices import Choice, Chooser
from piip_scale.engine.planning.cluster import Cluster, cpu_cluster, gpu_cluster
from piip_scale.engine.planning.memory import GIB
from piip_scale.logging import get_logger
from piip_scale.tasks.base import Task
from piip_scale.world import World


def settle_layout(config: RunConfig, task: Task, world: World, device: torch.device) -> RunConfig:
    """The run with what ``zero.strategy="auto"`` left open decided, the same on every rank. Collective.

    The fastest layout that fits the smallest device is taken, of the main rank's kind of GPU, and ``zero.network_gbps``
    between nodes. ``checkpoint_blocks="auto"`` is decided with it. Logs one line.

    Args:
        config: The run on these ranks.
        task: Outlines it.
        world: The ranks.
        device: This rank's.

    Raises:
        ConfigError: What is not open does not go together on these ranks.
    """
    if not config.zero.open_keys:
        return config
    capacity = torch.tensor([device_bytes(device, world.ranks_per_node)], dtype=torch.int64, device=device)
    dist.all_reduce(capacity, dist.ReduceOp.MIN)
    choice, line = on_main(lambda: _chosen(config, task, world, device, int(capacity)))
    get_logger(__name__).info(line)
    return choice


def _chosen(config: RunConfig, task: Task, world: World, device: torch.device, capacity: int) -> tuple[RunConfig, str]:
    cluster, kind = cluster_of(config, world, device)
    planner = planner_on(device, task, capacity, world.ranks_per_node)
    # On a CPU both are one memory, which ranks share already.
    host = device_bytes(torch.device("cpu")) if device.type == "cuda" else math.inf
    choice = Chooser(planner, cluster, host).fastest_layout(config, config.zero.open_keys)
    return choice.config, layout_line(choice, kind, config.zero.network_gbps, capacity)


def cluster_of(config: RunConfig, world: World, device: torch.device) -> tuple[Cluster, str]:
    """The cluster that a run is on, as a plan knows it, and what its devices are taken for."""
    ranks, per_node, network_gbps = world.num_ranks, world.ranks_per_node, config.zero.network_gbps
    if device.type != "cuda":
        sharing = max(1.0, per_node / (os.cpu_count() or 1))
        return cpu_cluster(ranks, per_node, network_gbps, sharing), "cpu"
    name = torch.cuda.get_device_name(device)
    gpu = gpu_of_device(name) or GPUS[DEFAULT_GPU]
    kind = gpu.name if gpu.cuda_name in name else f"{name}, taken for {gpu.name}"
    return gpu_cluster(gpu, ranks, per_node, network_gbps, config.train.precision), kind


def layout_line(choice: Choice, kind: str, network_gbps: float, capacity: float) -> str:
    """What was decided, for the log."""
    plan, into = choice.memory, f"into {capacity / GIB:.1f}"
    if not plan.fits:
        fits = f"the least of all layouts, which does not fit {into}"
    elif not choice.fits:
        fits = f"which fits {into}, but needs {plan.host_memory * choice.ranks_per_node / GIB:.1f} GiB of a node's host"
    else:
        fits = f"which fits {into}"
    return (
        f"zero.strategy: {layout_text(choice.config)}: {choice.time.seconds:.3g} s a step by the plan for {kind} with "
        f"{network_gbps:g} Gb/s a node, {plan.total / GIB:.1f} GiB, {fits}"
    )


def layout_text(config: RunConfig) -> str:
    """A layout as a user would write it: its stage, and what else is not plain."""
    zero = config.zero
    named = {"shard_over": "all", "node_partition": 1, "offload_optimizer": "none", "offload_parameters": "none"}
    others = [f"{key}={getattr(zero, key)!r}" for key, plain in named.items() if getattr(zero, key) != plain]
    return ", ".join([f"stage={zero.stage}", *others])
