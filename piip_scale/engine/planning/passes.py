"""What a rank holds while gradients are made and sent: activations that go, gradients that come and wait."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from piip_scale.engine.planning.cluster import NCCL, Transport
from piip_scale.engine.rehearsal import Moment
from piip_scale.engine.zero.gradients import HELD_IN_FLIGHT
from piip_scale.engine.zero.plan import BYTES, Sharding
from piip_scale.engine.zero.replicas import IN_FLIGHT

# Elements that deepspeed 0.19.8 sums in one message without ZeRO.
_PLAIN_BUCKET = 500_000_000


@dataclass(frozen=True)
class Way:
    """What gradients cost on their way from the backward pass to where they stay, in bytes an element.

    Attributes:
        bucket: Elements that are sent at once; infinite where all are, when the backward pass is over.
        buffer: Bytes of a bucket's memory that is there from the first gradient to the last.
        waiting: Of a gradient that waits until its bucket is full, in memory of its own.
        sending: Of a bucket that is being sent, beside the gradients in it; less slices that come when it goes.
        flying: Bytes of gradients whose message goes on while the rank computes; ``HELD_IN_FLIGHT`` times.
        landing: Bytes of a message that is still to be summed over replicas; ``IN_FLIGHT`` of them.
        making: Of a gradient that stays where the backward pass makes it, and was not there before.
    """

    bucket: float
    buffer: float = 0.0
    waiting: float = 0.0
    sending: float = 0.0
    flying: float = 0.0
    landing: float = 0.0
    making: float = 0.0


@dataclass(frozen=True)
class Gathered:
    """Bytes of sharded parameters that are whole in the passes.

    Attributes:
        all: If all were.
        most: That are, at one time. They go when they have their gradients.
    """

    all: float = 0.0
    most: float = 0.0


@dataclass(frozen=True)
class Passes:
    """Bytes of the passes when they hold most; see ``MemoryPlan``."""

    backward: float
    buckets: float
    later: float


def way_of(sharding: Sharding, accumulation: int, transport: Transport = NCCL) -> Way:
    """How a run's gradients go: by our own ``engine.zero.gradients`` in stage 3, by DeepSpeed's ways elsewhere."""
    own = BYTES[sharding.precision]
    # Those of a second micro-batch find the first one's there.
    making = own if accumulation == 1 else 0
    if sharding.stage == 0 or (sharding.stage == 1 and sharding.precision == "bf16"):
        return Way(math.inf, sending=BYTES["fp32"], making=making)
    bucket = sharding.deepspeed["zero_optimization"]["reduce_bucket_size"]
    if sharding.stage == 1:
        return Way(math.inf, buffer=own * bucket, making=making)
    return _way_of_slices(sharding, bucket, own, transport, making)


def _way_of_slices(sharding: Sharding, bucket: int, own: int, transport: Transport, making: int) -> Way:
    ranks, sent = sharding.num_ranks, BYTES[sharding.zero.reduce_dtype]
    if sharding.stage == 2:
        # A copy of its own, for one rank too where it is cast; where it is not, slices come when it goes.
        flat = own + sent if own != sent else sent * (ranks > 1) - making / ranks
        return Way(bucket, buffer=own * bucket, sending=flat)
    if sharding.zero.offload_optimizer != "none":
        return Way(bucket, buffer=sent * bucket, sending=sent * (1 + transport.copies))
    landing = sent / ranks * bucket if sharding.num_replicas > 1 else 0.0
    sending = sent * (1 + transport.copies + 1 / ranks) * (ranks > 1)
    flying = own * bucket if transport.hides["reduce-scatter"] else 0.0
    return Way(bucket, waiting=own, sending=sending, flying=flying, landing=landing)


def passes_of(moments: Sequence[Moment], share: float, kept: float, way: Way, whole: Gathered) -> Passes:
    """What the passes hold beside state, what the forward pass keeps, and the most that is gathered.

    Args:
        moments: Of the backward pass.
        share: Bytes of activations in these passes for each of the moments'.
        kept: What the end of the forward pass holds, in bytes.
        way: Of gradients.
        whole: Of parameters.
    """
    backward = max(0.0, share * max(moment.until for moment in moments) - kept)
    beside = way.buffer + max(_alive(moments, share, way, whole)) - kept - backward - whole.most
    return Passes(backward, buckets=max(0.0, beside), later=max(0.0, -beside))


def _alive(moments: Sequence[Moment], share: float, way: Way, whole: Gathered) -> Iterator[float]:
    """What is there at every moment, and message, less gradients that are still to come."""
    waiting, sent = 0, 0
    missing = trained = sum(moment.numel for moment in moments)
    for moment in moments:
        beside = way.flying * min(sent, HELD_IN_FLIGHT) + way.landing * min(sent, IN_FLIGHT)
        yield share * moment.until + way.waiting * waiting + beside + _whole_or_to_come(missing, trained, way, whole)
        missing -= moment.numel
        beside += _whole_or_to_come(missing, trained, way, whole)
        if waiting and (not moment.numel or waiting + moment.numel > way.bucket):
            gradients = way.waiting * (waiting + moment.numel) + way.sending * min(waiting, _PLAIN_BUCKET)
            yield share * moment.after + gradients + beside
            waiting, sent = 0, sent + 1
        waiting += moment.numel


def _whole_or_to_come(missing: int, trained: int, way: Way, whole: Gathered) -> float:
    return min(whole.most, whole.all * missing / max(1, trained)) - way.making * missing
