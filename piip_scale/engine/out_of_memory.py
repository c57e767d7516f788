"""What a rank says when its device is full: what the run was planned to need, and which knob to turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from piip_scale.config.run import RunConfig
from piip_scale.engine.checkpoint_choice import device_bytes, planner_on
from piip_scale.engine.planning.lines import change_lines, memory_lines
from piip_scale.engine.planning.memory import GIB, MemoryPlan
from piip_scale.engine.planning.planner import Change
from piip_scale.errors import DeviceMemoryError
from piip_scale.tasks.base import Task
from piip_scale.world import World

# What did not fit was more than planned, or memory was in pieces: a change must promise more than a little.
_MUST_SAVE = 0.9


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device refused memory; libraries say so in words of their own."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("out of memory", "CPUAllocator"))
    )


def device_memory_error(task: Task, config: RunConfig, world: World, device: torch.device) -> DeviceMemoryError:
    """The error of a rank whose device is full, with the plan of the run in its details.

    Args:
        task: Outlines the run.
        config: The run, before it was scaled to its ranks.
        world: The ranks.
        device: The rank's.
    """
    capacity = device_bytes(device)
    planner = planner_on(device, task, capacity, world.ranks_per_node)
    # What was left to memory was decided with all of it, and more of it is a change like any other.
    config = planner.settled(config, world.num_ranks)
    plan = planner.plan(config, world.num_ranks)
    changes = planner.within(min(capacity, _MUST_SAVE * plan.total)).changes(config, world.num_ranks)
    return DeviceMemoryError(
        f"the device of rank {world.rank} ran out of memory",
        rule=f"of its {capacity / GIB:.1f} GiB this run was planned to need {plan.total / GIB:.1f} ({_most(plan)})",
        fix=_fix(changes),
        details="\n".join([*memory_lines(plan), *change_lines(plan, changes)]),
    )


def _fix(changes: Sequence[Change]) -> str:
    """The first knobs that together are enough."""
    if not changes:
        return "use smaller images or a smaller network"
    last = next((index for index, change in enumerate(changes) if change.plan.fits), len(changes) - 1)
    # More GPUs are a way of their own.
    turned = [change.knob for change in changes[:last] if " GPUs " not in change.knob] + [changes[last].knob]
    return f"set {', '.join(turned)} for {changes[last].plan.total / GIB:.1f} GiB"


def _most(plan: MemoryPlan) -> str:
    kinds = {
        "activations": sum(part.activations for part in plan.parts) + plan.backward,
        "weights": sum(part.weights for part in plan.parts) + plan.gathered,
        "gradients": sum(part.gradients for part in plan.parts) + plan.buckets,
        "optimiser": sum(part.masters + part.moments for part in plan.parts),
    }
    ordered = sorted(kinds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in ordered)
