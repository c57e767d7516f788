"""What one GPU holds of a run when it holds most: bytes by kind and part, as arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from piip_scale.config.run import RunConfig
from piip_scale.engine.report import bytes_per_rank
from piip_scale.engine.zero.plan import BYTES, Part, Sharding, Sizes
from piip_scale.engine.zero.replicas import IN_FLIGHT

GIB = 2**30
RESERVE_BYTES = int(1.5 * GIB)
"""Of a GPU, for its context, communication buffers and workspaces of libraries: an assumption."""
# deepspeed 0.19.8's own, where the config does not say.
_MAX_LIVE_PARAMETERS = 1_000_000_000


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


def part_memory(part: Part, sharding: Sharding, activations: float) -> PartMemory:
    """Of one part on each GPU, with what it keeps for the backward pass."""
    kept = bytes_per_rank(part, sharding)
    # Moments are 8 bytes an element; a master weight and its running average, where there are any, 4 each.
    moments = kept.optimizer * 8 / (8 + 4 * (sharding.stage > 0) + 4 * sharding.averaged)
    masters = kept.optimizer - moments
    return PartMemory(part.name, kept.weights, kept.gradients, masters, moments, kept.host, activations)


def host_memory(part: PartMemory, config: RunConfig, sharding: Sharding) -> float:
    """Bytes of host memory that a rank needs for a part."""
    places = (config.zero.offload_optimizer, config.zero.offload_parameters)
    # One place serves both where both are offloaded: a disk takes none of it.
    offloaded = part.host if "cpu" in places else 0.0
    # Of replicas one saves each slice: this is the mean of a node's ranks.
    return offloaded + (part.masters + part.moments) / sharding.num_replicas * config.train.background_saves


def gathered(sizes: Sizes, sharding: Sharding) -> float:
    """Bytes of sharded parameters that are whole at once: as many as DeepSpeed lets be, if there are so many."""
    if sharding.stage < 3 or sharding.num_ranks == 1:
        return 0.0
    sharded = [p for p in sizes.parameters if sharding.shards(p)]
    most = sharding.deepspeed["zero_optimization"].get("stage3_max_live_parameters", _MAX_LIVE_PARAMETERS)
    share = min(1.0, most / max(1, sum(p.numel for p in sharded)))
    return float(share * sum(p.num_bytes(sharding.precision) for p in sharded))


def buckets(sharding: Sharding) -> float:
    """Bytes in which gradients are sent; a single rank's wait for each other in as many."""
    if not sharding.stage:
        return 0.0
    buckets = 1 + IN_FLIGHT / sharding.num_ranks * (sharding.num_replicas > 1)
    numel = buckets * sharding.deepspeed["zero_optimization"]["reduce_bucket_size"]
    return float(numel * BYTES[sharding.zero.reduce_dtype])
