"""What a run will need of each GPU, from its config alone, and which knob helps where that is too much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from piip_scale.config.run import RunConfig
from piip_scale.engine.batching import images_per_step, scale_to_ranks
from piip_scale.engine.planning.cluster import NCCL, Cluster, Transport
from piip_scale.engine.planning.knobs import OFFLOADING_BEGINS, none_checkpointed, turned, with_checkpointed
from piip_scale.engine.planning.memory import (
    RESERVE_BYTES,
    MemoryPlan,
    gathered,
    host_memory,
    part_memory,
    update_bytes,
)
from piip_scale.engine.planning.passes import passes_of, way_of
from piip_scale.engine.planning.rehearsed import Rehearsed
from piip_scale.engine.planning.step_time import StepTime, step_time
from piip_scale.engine.planning.work import run_work
from piip_scale.engine.zero.plan import plan_sharding
from piip_scale.engine.zero.traffic import Collective, step_traffic
from piip_scale.errors import ConfigError
from piip_scale.tasks.base import Outline

_DOUBLINGS = 4

OutlineOf = Callable[[RunConfig], Outline]


@dataclass(frozen=True)
class Change:
    """A knob turned, after those before it.

    Attributes:
        knob: What to set, as a user would write it.
        plan: What it comes to.
    """

    knob: str
    plan: MemoryPlan


def predict(config: RunConfig, cluster: Cluster, outline_of: OutlineOf) -> StepTime:
    """How long a step of a run takes on a cluster: pure, the same everywhere.

    Args:
        config: The run; branches that leave ``checkpoint_blocks`` to memory have enough.
        cluster: Ranks, links and rates.
        outline_of: The outline of a run, as ``tasks.outline.outline_run`` or a task makes it.

    Raises:
        ConfigError: The run cannot be, on these ranks or as sharded as it says.
    """
    return Planner(outline_of, math.inf, cluster.ranks_per_node).step_time(config, cluster)


class Planner:
    """Plans runs that differ from each other, rehearsing each network once.

    Args:
        outline_of: The outline of a run: what planning needs of its task.
        capacity: Bytes of a GPU.
        ranks_per_node: GPUs of a node; ``None`` has all on one.
        transport: How messages travel.

    Attributes:
        capacity: As given.
    """

    def __init__(
        self, outline_of: OutlineOf, capacity: float, ranks_per_node: int | None = None, transport: Transport = NCCL
    ) -> None:
        self._outline_of, self.capacity, self._ranks_per_node = outline_of, capacity, ranks_per_node
        self._transport = transport
        self._known: dict[object, Rehearsed] = {}

    def within(self, capacity: float) -> Planner:
        """The same for GPUs of another size; what was rehearsed stays known."""
        other = Planner(self._outline_of, capacity, self._ranks_per_node, self._transport)
        other._known = self._known
        return other

    def plan(self, config: RunConfig, num_ranks: int) -> MemoryPlan:
        """What a run needs of each GPU.

        ``checkpoint_blocks="auto"`` is decided first.

        Raises:
            ConfigError: The run cannot be, on so many ranks or as sharded as it says.
        """
        config = self.settled(config, num_ranks)
        scaled = scale_to_ranks(config, num_ranks)
        rehearsed = self._rehearsed(config)
        sharding = plan_sharding(scaled, rehearsed.sizes, num_ranks, self._ranks_per_node)
        share = scaled.data.micro_batch_size / rehearsed.micro_batch_size
        kept = {name: share * activations for name, activations in rehearsed.kept.items()}
        way = way_of(sharding, scaled.train.gradient_accumulation, self._transport)
        whole = gathered(rehearsed.sizes, sharding)
        passes = passes_of(rehearsed.moments, share, sum(kept.values()), way, whole)
        parts = tuple(part_memory(part, sharding, kept.pop(part.name, 0.0)) for part in rehearsed.sizes.parts)
        return MemoryPlan(
            parts=parts,
            gathered=whole.most,
            buckets=passes.buckets,
            backward=passes.backward + sum(kept.values()),
            later=passes.later,
            update=update_bytes(rehearsed.sizes, sharding),
            reserve=RESERVE_BYTES,
            capacity=self.capacity,
            num_ranks=num_ranks,
            micro_batch_size=scaled.data.micro_batch_size,
            images_per_step=images_per_step(config, num_ranks),
            host_memory=sum(host_memory(part, config, sharding) for part in parts),
        )

    def traffic(self, config: RunConfig, num_ranks: int) -> tuple[Collective, ...]:
        """What a step of a run sends.

        Raises:
            ConfigError: As ``plan``.
        """
        scaled = scale_to_ranks(config, num_ranks)
        sizes = self._rehearsed(config).sizes
        return step_traffic(sizes, plan_sharding(scaled, sizes, num_ranks, self._ranks_per_node))

    def step_time(self, config: RunConfig, cluster: Cluster) -> StepTime:
        """How long a step of a run takes.

        Args:
            config: The run.
            cluster: Its ranks and their rates; of nodes as large as the planner's.

        Raises:
            ConfigError: As ``plan``, or heads that no rule counts.
        """
        config = self.settled(config, cluster.num_ranks)
        scaled = scale_to_ranks(config, cluster.num_ranks)
        rehearsed, whole = self._rehearsed(config), self._rehearsed(none_checkpointed(config))
        sharding = plan_sharding(scaled, rehearsed.sizes, cluster.num_ranks, cluster.ranks_per_node)
        kept = {name: activations / whole.micro_batch_size for name, activations in whole.kept.items()}
        # What is computed again is no part of the count: one serves all.
        work = run_work(config.model, whole.counted, kept, rehearsed.operators)
        return step_time(work, rehearsed.sizes, sharding, step_traffic(rehearsed.sizes, sharding), cluster)

    def settled(self, config: RunConfig, num_ranks: int) -> RunConfig:
        """The run with ``checkpoint_blocks="auto"`` decided: as few branches compute blocks again as memory allows.

        The narrowest comes first: what a block keeps grows with its width, its arithmetic with the width's square.
        Where even all are not enough all do.
        """
        open_ones = [i for i, branch in enumerate(config.model.branches) if branch.checkpoint_blocks == "auto"]
        always = {i for i, branch in enumerate(config.model.branches) if branch.checkpoint_blocks is True}
        for count in range(len(open_ones)):
            chosen = with_checkpointed(config, always | set(open_ones[len(open_ones) - count :]))
            if self.plan(chosen, num_ranks).fits:
                return chosen
        return with_checkpointed(config, always | set(open_ones)) if open_ones else config

    def without_checkpoints(self, config: RunConfig, num_ranks: int) -> MemoryPlan | None:
        """The plan if no block were computed again, for a run that does so without need; else ``None``."""
        if not any(branch.checkpoint_blocks is True for branch in config.model.branches):
            return None
        plan = self.plan(with_checkpointed(config, set()), num_ranks)
        return plan if plan.fits else None

    def changes(self, config: RunConfig, num_ranks: int) -> list[Change]:
        """Knobs to turn one after the other until the run fits, the cheapest first; those that change nothing left out.

        More GPUs are another way: the knobs after them are turned without. Empty where the run fits as it is.

        Args:
            config: The run.
            num_ranks: GPUs.
        """
        found: list[Change] = []
        plan = self.plan(config, num_ranks)
        for knob, changed in turned(config):
            if plan.fits:
                break
            if knob == OFFLOADING_BEGINS:
                found += self._more_ranks(changed, num_ranks)
                continue
            after = self.plan(changed, num_ranks)
            if after.total < plan.total:
                found.append(Change(knob, after))
                plan = after
        return found

    def _more_ranks(self, config: RunConfig, num_ranks: int) -> Iterator[Change]:
        """The smallest number of GPUs, by doubling, with which the run fits."""
        for doublings in range(1, _DOUBLINGS + 1):
            ranks = num_ranks * 2**doublings
            try:
                plan = self.plan(config, ranks)
            except ConfigError:  # a step has too few images for so many
                return
            if plan.fits:
                yield Change(f"{ranks} GPUs instead of {num_ranks}", plan)
                return

    def _rehearsed(self, config: RunConfig) -> Rehearsed:
        key = (config.model, config.train.precision)
        if key not in self._known:
            self._known[key] = Rehearsed(self._outline_of(config), config.data.micro_batch_size)
        return self._known[key]
