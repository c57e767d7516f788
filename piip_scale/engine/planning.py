"""What a run will need of each GPU, from its config alone, and which knob helps where that is too much."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import ValidationError

from piip_scale.config.run import DataConfig, RunConfig
from piip_scale.engine.batching import images_per_step, scale_to_ranks
from piip_scale.engine.rehearsal import Rehearsal, rehearse
from piip_scale.engine.report import bytes_per_rank
from piip_scale.engine.zero.plan import BYTES, Part, Sharding, Sizes, measure, plan_sharding
from piip_scale.engine.zero.replicas import IN_FLIGHT
from piip_scale.engine.zero.traffic import Collective, step_traffic
from piip_scale.errors import ConfigError
from piip_scale.tasks.base import Outline

GIB = 2**30
RESERVE_BYTES = int(1.5 * GIB)
"""Of a GPU, for its context, communication buffers and workspaces of libraries: an assumption."""
_DOUBLINGS = 4
_OFFLOADING_BEGINS = ""
# deepspeed 0.19.8's own, where the config does not say.
_MAX_LIVE_PARAMETERS = 1_000_000_000

OutlineOf = Callable[[RunConfig], Outline]


@dataclass(frozen=True)
class PartMemory:
    """Bytes of a part on one GPU.

    Attributes:
        name: The model's name for it.
        weights: Slices of sharded ones, and those that stay whole.
        gradients: Between backward passes.
        masters: Weights in float32 that the optimiser keeps, and their running average.
        moments: Adam's two.
        host: The share of all these that offloading keeps in host memory or on a disk.
        activations: What the part keeps for the backward pass of one micro-batch.
    """

    name: str
    weights: float
    gradients: float
    masters: float
    moments: float
    host: float
    activations: float

    @property
    def device(self) -> float:
        """On the GPU, activations included."""
        return self.weights + self.gradients + self.masters + self.moments - self.host + self.activations


@dataclass(frozen=True)
class MemoryPlan:
    """What one GPU holds when it holds most.

    Attributes:
        parts: By part of the model; the activations of the heads are an estimate.
        gathered: Sharded parameters that are whole at one time.
        buckets: What gradients are sent in.
        backward: What the backward pass needs beside what is kept: one block's recomputation, and gradients on
            their way.
        reserve: What libraries take, an assumption.
        capacity: Of the GPU.
        num_ranks: GPUs.
        micro_batch_size: Images of a micro-batch.
        images_per_step: Images of an optimiser step, on all GPUs.
        host_memory: Of one rank: state offloaded to host memory, and the copy that saves in the background write from.
    """

    parts: tuple[PartMemory, ...]
    gathered: float
    buckets: float
    backward: float
    reserve: float
    capacity: float
    num_ranks: int
    micro_batch_size: int
    images_per_step: int
    host_memory: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on one GPU."""
        return sum(part.device for part in self.parts) + self.gathered + self.buckets + self.backward + self.reserve

    @property
    def host(self) -> float:
        """Bytes off the GPU, of one rank."""
        return sum(part.host for part in self.parts)

    @property
    def fits(self) -> bool:
        """Whether the GPU holds it."""
        return self.total <= self.capacity


@dataclass(frozen=True)
class Change:
    """A knob turned, after those before it.

    Attributes:
        knob: What to set, as a user would write it.
        plan: What it comes to.
    """

    knob: str
    plan: MemoryPlan


class Planner:
    """Plans runs that differ from each other, rehearsing each network once.

    Args:
        outline_of: The outline of a run: what planning needs of its task.
        capacity: Bytes of a GPU.
        ranks_per_node: GPUs of a node; ``None`` has all on one.
    """

    def __init__(self, outline_of: OutlineOf, capacity: float, ranks_per_node: int | None = None) -> None:
        self._outline_of, self._capacity, self._ranks_per_node = outline_of, capacity, ranks_per_node
        self._known: dict[object, _Rehearsed] = {}

    def within(self, capacity: float) -> Planner:
        """The same for GPUs of another size; what was rehearsed stays known."""
        other = Planner(self._outline_of, capacity, self._ranks_per_node)
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
        parts = tuple(_part_memory(part, sharding, kept.pop(part.name, 0.0)) for part in rehearsed.sizes.parts)
        return MemoryPlan(
            parts=parts,
            gathered=_gathered(rehearsed.sizes, sharding),
            buckets=_buckets(sharding),
            backward=share * rehearsed.backward + sum(kept.values()),
            reserve=RESERVE_BYTES,
            capacity=self._capacity,
            num_ranks=num_ranks,
            micro_batch_size=scaled.data.micro_batch_size,
            images_per_step=images_per_step(config, num_ranks),
            host_memory=sum(_host_memory(part, config, sharding) for part in parts),
        )

    def traffic(self, config: RunConfig, num_ranks: int) -> tuple[Collective, ...]:
        """What a step of a run sends.

        Raises:
            ConfigError: As ``plan``.
        """
        scaled = scale_to_ranks(config, num_ranks)
        sizes = self._rehearsed(config).sizes
        return step_traffic(sizes, plan_sharding(scaled, sizes, num_ranks, self._ranks_per_node))

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
        for knob, changed in _turned(config):
            if plan.fits:
                break
            if knob == _OFFLOADING_BEGINS:
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

    def _rehearsed(self, config: RunConfig) -> _Rehearsed:
        key = (config.model, config.train.precision)
        if key not in self._known:
            self._known[key] = _Rehearsed(self._outline_of(config), config.data.micro_batch_size)
        return self._known[key]


class _Rehearsed:
    """An outline's sizes and activations, in bytes of so many images."""

    def __init__(self, outline: Outline, micro_batch_size: int) -> None:
        self.micro_batch_size = micro_batch_size
        self.sizes = measure(outline.model, outline.parts)
        self._outline = outline

    @cached_property
    def _found(self) -> tuple[Rehearsal, int]:
        outline = self._outline
        found = rehearse(outline.network, outline.parts, outline.run)
        return found, outline.head_bytes(found.features)

    @property
    def kept(self) -> dict[str, int]:
        """At the end of the forward pass, by part."""
        rehearsal, head_bytes = self._found
        heads = self._outline.heads
        return dict(rehearsal.kept) | {heads: rehearsal.kept.get(heads, 0) + head_bytes}

    @property
    def backward(self) -> int:
        """Beside what is kept: gradients of the features, or what the network's own backward pass adds.

        The heads have been let go when the network's backward pass begins.
        """
        rehearsal, heads = self._found
        gradients = sum(feature.nbytes for feature in rehearsal.features)
        return max(gradients, rehearsal.peak - rehearsal.total_bytes - heads)


def _part_memory(part: Part, sharding: Sharding, activations: float) -> PartMemory:
    kept = bytes_per_rank(part, sharding)
    # Moments are 8 bytes an element; a master weight and its running average, where there are any, 4 each.
    moments = kept.optimizer * 8 / (8 + 4 * (sharding.stage > 0) + 4 * sharding.averaged)
    masters = kept.optimizer - moments
    return PartMemory(part.name, kept.weights, kept.gradients, masters, moments, kept.host, activations)


def _host_memory(part: PartMemory, config: RunConfig, sharding: Sharding) -> float:
    places = (config.zero.offload_optimizer, config.zero.offload_parameters)
    # One place serves both where both are offloaded: a disk takes none of it.
    offloaded = part.host if "cpu" in places else 0.0
    # Of replicas one saves each slice: this is the mean of a node's ranks.
    return offloaded + (part.masters + part.moments) / sharding.num_replicas * config.train.background_saves


def _gathered(sizes: Sizes, sharding: Sharding) -> float:
    """Bytes of sharded parameters that are whole at once: as many as DeepSpeed lets be, if there are so many."""
    if sharding.stage < 3 or sharding.num_ranks == 1:
        return 0.0
    sharded = [p for p in sizes.parameters if sharding.shards(p)]
    most = sharding.deepspeed["zero_optimization"].get("stage3_max_live_parameters", _MAX_LIVE_PARAMETERS)
    share = min(1.0, most / max(1, sum(p.numel for p in sharded)))
    return float(share * sum(p.num_bytes(sharding.precision) for p in sharded))


def _buckets(sharding: Sharding) -> float:
    """Bytes in which gradients are sent; a single rank's wait for each other in as many."""
    if not sharding.stage:
        return 0.0
    buckets = 1 + IN_FLIGHT / sharding.num_ranks * (sharding.num_replicas > 1)
    numel = buckets * sharding.deepspeed["zero_optimization"]["reduce_bucket_size"]
    return float(numel * BYTES[sharding.zero.reduce_dtype])


def _turned(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """The config after one knob more each time, and the knob as a user would write it."""
    config = _checkpointed(config)
    yield "checkpoint_blocks=True in every branch and model.interaction.checkpoint_units=True", config
    for micro in _smaller(config.data):
        config = config.model_copy(update={"data": micro})
        yield f"data.micro_batch_size={micro.micro_batch_size}", config
    yield _OFFLOADING_BEGINS, config
    for field in ("offload_optimizer", "offload_parameters"):
        config = config.model_copy(update={"zero": config.zero.model_copy(update={field: "cpu"})})
        yield f"zero.{field}='cpu'", config


def _smaller(data: DataConfig) -> Iterator[DataConfig]:
    """The data with its micro-batch halved again and again, as far as its task lets it be."""
    size = data.micro_batch_size
    while size > 1:
        size //= 2
        try:
            yield type(data).model_validate(data.model_dump() | {"micro_batch_size": size})
        except ValidationError:
            return


def _checkpointed(config: RunConfig) -> RunConfig:
    config = with_checkpointed(config, set(range(len(config.model.branches))))
    unit = config.model.interaction.model_copy(update={"checkpoint_units": True})
    return config.model_copy(update={"model": config.model.model_copy(update={"interaction": unit})})


def with_checkpointed(config: RunConfig, again: Collection[int]) -> RunConfig:
    """The run with these branches, by index, computing their blocks again, and no others."""
    branches = tuple(
        branch.model_copy(update={"checkpoint_blocks": index in again})
        for index, branch in enumerate(config.model.branches)
    )
    return config.model_copy(update={"model": config.model.model_copy(update={"branches": branches})})


def memory_lines(plan: MemoryPlan) -> list[str]:
    """A table of a plan in GiB: kinds by part, then what is nobody's in particular."""
    names = ("weights", "gradients", "masters", "moments", "activations", "off GPU")
    gpus = "the GPU" if plan.num_ranks == 1 else f"each of {plan.num_ranks} GPUs"
    lines = [f"GiB on {gpus}, micro-batches of {plan.micro_batch_size}", _cells("part", *names)]
    kinds = [(p.weights, p.gradients, p.masters, p.moments, p.activations, p.host) for p in plan.parts]
    names_of_parts = [*(part.name for part in plan.parts), "all parts"]
    for name, row in zip(names_of_parts, [*kinds, [sum(column) for column in zip(*kinds, strict=True)]], strict=True):
        lines.append(_cells(name, *(f"{size / GIB:.2f}" for size in row)))
    rest = {"gathered": plan.gathered, "buckets": plan.buckets, "backward": plan.backward, "libraries": plan.reserve}
    lines.append("and " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in rest.items()))
    verdict = "fits into" if plan.fits else "does not fit into"
    lines.append(f"{plan.total / GIB:.1f} GiB, which {verdict} {plan.capacity / GIB:.1f}")
    return lines


def host_line(plan: MemoryPlan, ranks_per_node: int, capacity: float | None) -> str:
    """What a node's host memory holds, and whether it can where that is known."""
    needed = plan.host_memory * ranks_per_node
    verdict = (
        ""
        if capacity is None
        else f", which {'fits' if needed <= capacity else 'does not fit'} into {capacity / GIB:.1f}"
    )
    fix = "" if capacity is None or needed <= capacity else ": set train.background_saves=False or offload less"
    return (
        f"{needed / GIB:.1f} GiB of a node's host memory for what is offloaded and the copies that saves write from"
        f"{verdict}{fix}; loaders, and page-locked memory's rounding to powers of two, come on top"
    )


def kept_blocks_line(plan: MemoryPlan | None, saved_share: float) -> str:
    """What not to compute blocks again would gain, where ``Planner.without_checkpoints`` found a plan that fits."""
    if plan is None:
        return ""
    return (
        f"without checkpointed blocks {plan.total / GIB:.1f} GiB, which fits too and leaves out {saved_share:.0%} of a "
        "step's arithmetic: set checkpoint_blocks='auto' in every branch"
    )


def change_lines(plan: MemoryPlan, changes: Sequence[Change]) -> list[str]:
    """What to change, in this order, where a plan does not fit."""
    if plan.fits:
        return []
    lines = ["to make it fit, in this order:"]
    for change in changes:
        verdict = "fits" if change.plan.fits else "does not yet"
        lines.append(f"  {change.knob}: {change.plan.total / GIB:.1f} GiB, {verdict}")
    if not any(change.plan.fits for change in changes):
        lines.append("  nothing here is enough: smaller images, a smaller network, or GPUs with more memory")
    return lines


def _cells(name: str, *others: str) -> str:
    return f"{name:<16}" + "".join(f"{text:>13}" for text in others)
