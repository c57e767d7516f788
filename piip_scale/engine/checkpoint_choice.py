"""Which branches compute their blocks again in the backward pass, where a config leaves that to the memory there is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from piip_scale.agreement import on_main
from piip_scale.config.run import RunConfig
from piip_scale.engine.planning.cluster import GLOO, NCCL
from piip_scale.engine.planning.knobs import with_checkpointed
from piip_scale.engine.planning.memory import GIB
from piip_scale.engine.planning.planner import Planner
from piip_scale.engine.resuming import Checkpoint
from piip_scale.logging import get_logger
from piip_scale.tasks.base import Task
from piip_scale.world import World


def settle_checkpointing(
    config: RunConfig, task: Task, world: World, device: torch.device, found: Checkpoint | None
) -> RunConfig:
    """The run with ``checkpoint_blocks="auto"`` of its branches decided, the same on every rank. Collective.

    A run that resumes on as many ranks as before keeps what was decided then; on others, or at its start, the plan
    decides by the smallest device. Results do not depend on it, time and memory do.

    Args:
        config: The run on these ranks.
        task: Outlines it.
        world: The ranks.
        device: This rank's.
        found: The checkpoint that it goes on from.
    """
    if not leaves_open(config):
        return config
    if found is not None and found.state.num_ranks == world.num_ranks:
        return _decided_as_before(config, found.state.config)
    capacity = torch.tensor([device_bytes(device, world.ranks_per_node)], dtype=torch.int64, device=device)
    dist.all_reduce(capacity, dist.ReduceOp.MIN)
    settled = on_main(
        lambda: planner_on(device, task, int(capacity), world.ranks_per_node).settled(config, world.num_ranks)
    )
    get_logger(__name__).info(settled_line(settled, int(capacity)))
    return settled


def planner_on(device: torch.device, task: Task, capacity: float, ranks_per_node: int) -> Planner:
    """The planner of a task's runs on devices such as this one.

    Args:
        device: A rank's.
        task: Outlines the runs.
        capacity: Bytes of the smallest device.
        ranks_per_node: Ranks of a node.
    """
    transport = NCCL if device.type == "cuda" else GLOO
    return Planner(partial(task.outline, device_type=device.type), capacity, ranks_per_node, transport)


def leaves_open(config: RunConfig) -> bool:
    """Whether a branch's ``checkpoint_blocks`` is ``auto``."""
    return any(branch.checkpoint_blocks == "auto" for branch in config.model.branches)


def settled_line(config: RunConfig, capacity: int) -> str:
    """What was decided, for the log."""
    again = [index for index, branch in enumerate(config.model.branches) if branch.checkpoint_blocks]
    which = (
        "no branch computes" if not again else f"of branches {', '.join(map(str, again))} the backward pass computes"
    )
    return f"checkpoint_blocks: {which} blocks again, by the plan for {capacity / GIB:.1f} GiB"


def device_bytes(device: torch.device, ranks_of_host: int = 1) -> int:
    """Memory of a device; of a CPU's host the share of one rank."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_of_host


def _decided_as_before(config: RunConfig, saved: Mapping[str, Any]) -> RunConfig:
    branches = zip(config.model.branches, saved["model"]["branches"], strict=True)
    again = {i for i, (now, before) in enumerate(branches) if now.checkpoint_blocks and before["checkpoint_blocks"]}
    return with_checkpointed(config, again)
