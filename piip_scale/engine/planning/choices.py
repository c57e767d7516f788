"""Other ways to run the same steps: layouts, what is computed again, micro-batches; each with its memory and time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from piip_scale.config.run import RunConfig
from piip_scale.config.zero import LAYOUT, ZeroConfig
from piip_scale.data.order import divisors
from piip_scale.engine.batching import images_per_step, scale_to_ranks, with_micro_batch
from piip_scale.engine.planning.cluster import Cluster
from piip_scale.engine.planning.knobs import all_checkpointed, none_checkpointed
from piip_scale.engine.planning.memory import MemoryPlan
from piip_scale.engine.planning.planner import Planner
from piip_scale.engine.planning.step_time import StepTime
from piip_scale.errors import ConfigError

# Beyond that accumulation is as good, and a mistake in the estimate of activations counts for more.
_LARGEST_MICRO_BATCH = 8
_FREE: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Choice:
    """A way to run.

    Attributes:
        name: What differs from the run as it was asked for, as a user would write it; empty for that itself.
        config: The run.
        memory: Of each GPU.
        time: Of a step.
        host_capacity: Bytes of a node's host memory; infinite where it is not known.
        ranks_per_node: Ranks that share it.
    """

    name: str
    config: RunConfig
    memory: MemoryPlan
    time: StepTime
    host_capacity: float
    ranks_per_node: int

    @property
    def fits(self) -> bool:
        """Whether GPUs and hosts hold it."""
        return self.memory.fits and self.memory.host_memory * self.ranks_per_node <= self.host_capacity


class Chooser:
    """Looks for faster ways to run.

    Args:
        planner: Of GPUs as they are.
        cluster: Its ranks and their rates.
        host_capacity: Bytes of a node's host memory.
    """

    def __init__(self, planner: Planner, cluster: Cluster, host_capacity: float = float("inf")) -> None:
        self._planner, self._cluster, self._host = planner, cluster, host_capacity

    def asked(self, config: RunConfig) -> Choice:
        """The run as it is.

        Raises:
            ConfigError: It cannot be.
        """
        return self._choice("", config)

    def one_by_one(self, config: RunConfig) -> list[Choice]:
        """All that differ from a run by one decision, as far as they can be."""
        changed = [*self._layouts(config), *_checkpointings(config), *self._micro_batches(config)]
        return list(self._possible((name, other) for name, other in changed if other != config))

    def fastest(self, config: RunConfig) -> Choice | None:
        """The fastest that fits of all layouts, checkpointings and micro-batches together; ``None`` where none does."""
        return _fastest(self._possible(self._all(config)))

    def fastest_layout(self, config: RunConfig, open_keys: Collection[str] = tuple(LAYOUT)) -> Choice:
        """The fastest that fits of all layouts; where none does, the one that needs least memory, of GPUs first.

        Args:
            config: The run.
            open_keys: Keys of the layout that may change.

        Raises:
            ConfigError: The others do not go together.
        """
        fixed = {key: getattr(config.zero, key) for key in LAYOUT if key not in open_keys}
        choices = list(self._possible([("", config), *self._layouts(config, fixed)]))
        if not choices:
            return self.asked(config)
        return _fastest(choices) or min(choices, key=_missing)

    def _all(self, config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
        for layout, of_layout in [("", config), *self._layouts(config)]:
            for again, of_again in [("", of_layout), *_checkpointings(of_layout)]:
                for micro, changed in [("", of_again), *self._micro_batches(of_again)]:
                    yield ", ".join(filter(None, (layout, again, micro))), changed

    def _possible(self, named: Iterable[tuple[str, RunConfig]]) -> Iterator[Choice]:
        for name, config in named:
            try:
                yield self._choice(name, config)
            except ConfigError:  # raw keys of DeepSpeed's, or the ranks, do not go with it
                continue

    def _choice(self, name: str, config: RunConfig) -> Choice:
        ranks = self._cluster.num_ranks
        settled = self._planner.settled(config, ranks)
        memory, time = self._planner.plan(settled, ranks), self._planner.step_time(settled, self._cluster)
        return Choice(name, settled, memory, time, self._host, self._cluster.ranks_per_node)

    def _layouts(self, config: RunConfig, fixed: Mapping[str, Any] = _FREE) -> Iterator[tuple[str, RunConfig]]:
        for changes in layouts_of(self._cluster.num_ranks, self._cluster.ranks_per_node):
            zero = _with_layout(config, changes | dict(fixed))
            # All that differs from this run: setting it makes that layout out of it.
            if zero is not None and (differing := _differing(config.zero, zero)):
                name = ", ".join(f"zero.{key}={value!r}" for key, value in differing.items())
                yield name, config.model_copy(update={"zero": zero})

    def _micro_batches(self, config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
        """Others that make steps of as many images."""
        ranks, images = self._cluster.num_ranks, images_per_step(config, self._cluster.num_ranks)
        now = scale_to_ranks(config, ranks).data.micro_batch_size
        train = config.train.model_copy(update={"images_per_step": images, "gradient_accumulation": 1})
        for size in divisors(images // ranks):
            if size == now or size > _LARGEST_MICRO_BATCH:
                continue
            with suppress(ValidationError):
                data = with_micro_batch(config.data, size)
                yield f"data.micro_batch_size={size}", config.model_copy(update={"data": data, "train": train})


def _fastest(choices: Iterable[Choice]) -> Choice | None:
    # Of equals the first, which differs least from what was asked for.
    return min((choice for choice in choices if choice.fits), key=_rounded_seconds, default=None)


def _missing(choice: Choice) -> tuple[bool, float]:
    """Orders what does not fit: where a GPU holds it the host is too small."""
    memory = choice.memory
    return not memory.fits, memory.host_memory if memory.fits else memory.total


def _rounded_seconds(choice: Choice) -> float:
    """A step's to five digits: those of equals differ by how they were added up."""
    return float(f"{choice.time.seconds:.5g}")


def layouts_of(num_ranks: int, ranks_per_node: int) -> Iterator[dict[str, Any]]:
    """All that are looked at, as changes to a plain section ``zero``; those that cannot be too.

    Args:
        num_ranks: All.
        ranks_per_node: Of each node.
    """
    # Stage 2 is planned to be as fast as stage 1, and measured to take up to a fifth longer: it comes after.
    yield from ({"stage": stage} for stage in (3, 1, 2, 0))
    nodes = num_ranks // ranks_per_node
    if nodes > 1 and ranks_per_node > 1:
        yield {"stage": 3, "shard_over": "node"}
        yield {"stage": 3, "node_partition": ranks_per_node}
    group = 2
    while group < nodes and nodes % group == 0:
        yield {"stage": 3, "shard_over": group * ranks_per_node}
        group *= 2
    yield {"stage": 3, "offload_optimizer": "cpu"}
    yield {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}


def _differing(now: ZeroConfig, then: ZeroConfig) -> dict[str, Any]:
    """Keys of the layout that another section has otherwise, and how."""
    return {key: getattr(then, key) for key in LAYOUT if getattr(then, key) != getattr(now, key)}


def _with_layout(config: RunConfig, changes: dict[str, Any]) -> ZeroConfig | None:
    """``None`` where the config's own rules do not allow it."""
    zero = config.zero.model_copy(update=LAYOUT | changes)
    try:
        type(config).model_validate(config.model_dump() | {"zero": zero.model_dump()})
    except ValidationError:
        return None
    return zero


def _checkpointings(config: RunConfig) -> list[tuple[str, RunConfig]]:
    ways = [
        (
            "model.branches.*.checkpoint_blocks=False, model.interaction.checkpoint_units=False",
            none_checkpointed(config),
        ),
        ("model.branches.*.checkpoint_blocks=True, model.interaction.checkpoint_units=True", all_checkpointed(config)),
    ]
    return [(name, changed) for name, changed in ways if changed.model != config.model]
