"""What one GPU holds of a run when it holds most: bytes by kind and part, as arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from piip_scale.config.run import RunConfig
from piip_scale.engine.planning.passes import Gathered
from piip_scale.engine.report import bytes_per_rank
from piip_scale.engine.zero.plan import BUCKET_ELEMENTS, BYTES, Part, Sharding, Sizes

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
        gathered: Sharded parameters that are whole at one time of the passes.
        buckets: What gradients on their way to where they stay add.
        backward: What the backward pass needs beside what is kept: one block's recomputation, gradients of layers.
        later: Of the gradients, those that come only when activations have gone.
        update: What the update needs, when nothing of the passes is left.
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
    later: float = 0.0
    update: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on one GPU: those between steps, and the more of what the passes and the update need."""
        between = sum(part.device - part.activations for part in self.parts)
        return between + max(self._in_passes, self.update) + self.reserve

    @property
    def update_holds_most(self) -> bool:
        """Whether the update needs more than the passes, activations included."""
        return self.update > self._in_passes

    @property
    def _in_passes(self) -> float:
        activations = sum(part.activations for part in self.parts)
        return activations + self.gathered + self.buckets + self.backward - self.later

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
    if config.zero.offload_optimizer == "cpu":
        # DeepSpeed sums gradients in one place, and updates with a copy of them.
        offloaded += part.gradients
    # Of replicas one saves each slice: this is the mean of a node's ranks.
    return offloaded + (part.masters + part.moments) / sharding.num_replicas * config.train.background_saves


def gathered(sizes: Sizes, sharding: Sharding) -> Gathered:
    """Sharded parameters that are whole at once: as many as DeepSpeed lets be, if there are so many."""
    if sharding.stage < 3 or sharding.num_ranks == 1:
        return Gathered()
    sharded = [p for p in sizes.parameters if sharding.shards(p)]
    most = sharding.deepspeed["zero_optimization"].get("stage3_max_live_parameters", _MAX_LIVE_PARAMETERS)
    share = min(1.0, most / max(1, sum(p.numel for p in sharded)))
    num_bytes = float(sum(p.num_bytes(sharding.precision) for p in sharded))
    return Gathered(num_bytes, share * num_bytes)


def update_bytes(sizes: Sizes, sharding: Sharding) -> float:
    """Bytes that the update needs beside what is there between steps and gradients, without offloading."""
    trained = sum(p.numel for p in sizes.parameters if p.trainable)
    own, ranks = BYTES[sharding.precision], sharding.num_ranks
    if sharding.stage == 3 and sharding.zero.offload_optimizer == "none":
        residents = sum(p.numel for p in sizes.parameters if p.trainable and not sharding.shards(p))
        return float(own * min(residents, BUCKET_ELEMENTS) * (ranks > 1))
    if sharding.stage in (1, 2) and sharding.precision == "fp32":
        # DeepSpeed flattens the slices of gradients, which in stage 1 come in the place of whole ones.
        slices = own * trained / ranks
        return slices if sharding.stage == 2 else max(0.0, 2 * slices - own * trained)
    return 0.0
