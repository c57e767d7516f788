"""What an optimiser step sends, inside a node and between nodes, by layout: arithmetic without ranks or DeepSpeed.

A collective is counted as a ring of its ranks in order, which is how NCCL sends large messages: of n ranks each passes
(n - 1) / n of the message to the next for an all-gather or a reduce-scatter, twice as much for an all-reduce. A hop
between two nodes is between nodes, every other one inside. More rings over the same ranks, as NCCL makes, share the
bytes and change no sum. Gathers that reuse what is still whole are counted all the same, and so are those that
overlap; flags and norms, a few bytes each, are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from piip_scale.engine.zero.plan import BUCKET_ELEMENTS, BYTES, Parameter, Sharding, Sizes

Kind = Literal["all-gather", "reduce-scatter", "all-reduce"]
_GIGA, _MEGA = 10**9, 10**6
PASSES: dict[Kind, int] = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}
"""Times that all but one rank's part of a message travels round the ring."""


@dataclass(frozen=True)
class Collective:
    """The messages of one kind that a step sends in groups of ranks; every rank is in one group.

    Attributes:
        name: What travels, and when: ``weights, forward``.
        kind: How.
        num_ranks: Of a group.
        stride: From a rank of a group to the next.
        num_bytes: Of the whole messages of one group together: what an all-gather makes, what the others take; of
            groups that differ by their padding, the mean.
        per_step: Times that these are sent in a step.
        overlaps: What they can hide behind: ``forward``, ``backward``, or nothing.
        messages: They are at one of these times.
        when: In which micro-batches of a step, or in its update.
    """

    name: str
    kind: Kind
    num_ranks: int
    stride: int
    num_bytes: float
    per_step: int
    overlaps: Literal["forward", "backward", ""]
    messages: int = 1
    when: Literal["every", "first", "later", "last", "update"] = "every"

    @property
    def sent(self) -> float:
        """Bytes that one rank sends for it in a step."""
        return self.per_step * PASSES[self.kind] * (self.num_ranks - 1) / self.num_ranks * self.num_bytes

    def together(self, ranks_per_node: int) -> int:
        """Ranks of a group that are on one node."""
        return min(self.num_ranks, max(ranks_per_node // self.stride, 1))

    def between(self, ranks_per_node: int) -> float:
        """Bytes that leave a node for it in a step."""
        together = self.together(ranks_per_node)
        return self.sent * ranks_per_node / together if together < self.num_ranks else 0.0

    def inside(self, ranks_per_node: int) -> float:
        """Bytes that GPUs of a node send to others of it in a step."""
        return self.sent * ranks_per_node - self.between(ranks_per_node)


def step_traffic(sizes: Sizes, sharding: Sharding) -> tuple[Collective, ...]:
    """The collectives of one optimiser step, in the order of their first messages; none on a single rank.

    Args:
        sizes: The model's.
        sharding: Its plan.
    """
    made = _sharded_stage(sizes, sharding) if sharding.stage == 3 else _whole_weights(sizes, sharding)
    return tuple(each for each in made if each.num_ranks > 1 and each.num_bytes and each.per_step)


def bytes_between(traffic: Iterable[Collective], ranks_per_node: int) -> float:
    """Bytes that leave a node in a step."""
    return sum(each.between(ranks_per_node) for each in traffic)


def bytes_inside(traffic: Iterable[Collective], ranks_per_node: int) -> float:
    """Bytes that GPUs of a node send to others of it in a step."""
    return sum(each.inside(ranks_per_node) for each in traffic)


def traffic_lines(traffic: Sequence[Collective], ranks_per_node: int) -> list[str]:
    """A table of what a node sends in a step, in GB of 10^9 bytes or, where that is less, MB; nothing for one rank."""
    if not traffic:
        return []
    inside, between = bytes_inside(traffic, ranks_per_node), bytes_between(traffic, ranks_per_node)
    unit, scale = ("GB", _GIGA) if inside + between >= _GIGA else ("MB", _MEGA)
    lines = [_cells(f"{unit} that a node sends in a step", "ranks", "times", "inside", "to others")]
    for each in traffic:
        sent = (each.inside(ranks_per_node), each.between(ranks_per_node))
        name = f"{each.name} ({each.kind})"
        lines.append(_cells(name, str(each.num_ranks), str(each.per_step), *(f"{x / scale:.2f}" for x in sent)))
    return [*lines, _cells("all", "", "", f"{inside / scale:.2f}", f"{between / scale:.2f}")]


def _cells(name: str, *others: str) -> str:
    return f"{name:<48}" + "".join(f"{text:>10}" for text in others)


def _sharded_stage(sizes: Sizes, plan: Sharding) -> list[Collective]:
    """ZeRO-3: each parameter is padded to its ranks; residents are gathered where the update changed them."""
    ranks, micros = plan.num_ranks, _micro_batches(plan)
    trained = [p for p in sizes.parameters if p.trainable]
    whole = [p for p in trained if not plan.shards(p)]
    residents, messages = _gathered_bytes(whole, plan), 1 + sum(p.numel for p in whole) // BUCKET_ELEMENTS
    sums = BYTES[_reduce_dtype(plan)] * sum(_padded(p, ranks) for p in trained)
    return [
        *_gathers(sizes, plan),
        Collective("gradients", "reduce-scatter", ranks, 1, sums, micros, "backward", _buckets(trained, plan)),
        _between_replicas(trained, plan),
        Collective("resident weights, update", "all-gather", ranks, 1, residents, 1, "", messages, "update"),
    ]


def _gathers(sizes: Sizes, plan: Sharding) -> list[Collective]:
    """Of sharded weights, as if the backward pass reached all of them.

    hpZ has all ranks gather where the update changed weights, and those of its second copy wherever it did not.
    """
    ranks, micros, second = plan.num_ranks, _micro_batches(plan), plan.zero.node_partition
    sharded = [p for p in sizes.parameters if plan.shards(p)]
    every, changed = (_gathered_bytes(those, plan) for those in (sharded, [p for p in sharded if p.trainable]))
    forward, backward = "weights, forward", "weights, backward"
    # A unit is gathered in one message, what is in none parameter by parameter.
    units = len({p.unit or p.name for p in sharded})
    if second == 1:
        return [
            Collective(forward, "all-gather", ranks, 1, every, micros, "forward", units),
            Collective(backward, "all-gather", ranks, 1, every, micros, "backward", units),
        ]
    return [
        Collective(f"changed {forward}", "all-gather", ranks, 1, changed, 1, "forward", units, "first"),
        Collective(f"changed {forward} again", "all-gather", second, 1, changed, micros - 1, "forward", units, "later"),
        Collective(f"frozen {forward}", "all-gather", second, 1, every - changed, micros, "forward", units),
        Collective(backward, "all-gather", second, 1, every, micros, "backward", units),
    ]


def _between_replicas(trained: Sequence[Parameter], plan: Sharding) -> Collective:
    """The sums of one rank's slices; groups of other slices have a little more or less."""
    share = sum(p.numel for p in trained) / plan.num_ranks
    num_bytes, messages = BYTES[_reduce_dtype(plan)] * share, _buckets(trained, plan)
    name, stride = "gradients, replicas", plan.num_ranks
    return Collective(name, "all-reduce", plan.num_replicas, stride, num_bytes, 1, "backward", messages, "last")


def _whole_weights(sizes: Sizes, plan: Sharding) -> list[Collective]:
    """Stages 0 to 2, padding of their flat groups aside; stage 2 sums whole gradients in each micro-batch."""
    parameters = [p for p in sizes.parameters if p.trainable]
    trained, messages = sum(p.numel for p in parameters), _buckets(parameters, plan)
    ranks, often = plan.num_ranks, _micro_batches(plan) if plan.stage == 2 else 1
    sums, weights = BYTES[_reduce_dtype(plan)] * trained, BYTES[plan.precision] * trained * (plan.stage > 0)
    when: Literal["every", "update"] = "every" if plan.stage == 2 else "update"
    return [
        Collective("gradients", "all-reduce", ranks, 1, sums, often, "", messages, when),
        Collective("weights, update", "all-gather", ranks, 1, weights, 1, "", messages, "update"),
    ]


def _buckets(trained: Iterable[Parameter], plan: Sharding) -> int:
    """Messages in which gradients of all of these are sent."""
    bucket: int = plan.deepspeed["zero_optimization"].get("reduce_bucket_size", BUCKET_ELEMENTS)
    return max(1, math.ceil(sum(p.numel for p in trained) / bucket))


def _gathered_bytes(parameters: Iterable[Parameter], plan: Sharding) -> int:
    return sum(_padded(p, plan.num_ranks) * (p.num_bytes(plan.precision) // p.numel) for p in parameters)


def _padded(parameter: Parameter, num_ranks: int) -> int:
    return math.ceil(parameter.numel / num_ranks) * num_ranks


def _reduce_dtype(plan: Sharding) -> str:
    return plan.zero.reduce_dtype if plan.precision == "bf16" else "fp32"


def _micro_batches(plan: Sharding) -> int:
    number: int = plan.deepspeed["gradient_accumulation_steps"]
    return number
