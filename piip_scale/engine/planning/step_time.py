"""How long a step takes: compute, messages, update and host as terms, put together by what overlaps.

The passes of a micro-batch are pipelines: device, links inside nodes, links between nodes and links to the host work at
the same time, each on its own part, and the slowest of them sets the pace; but the first or last of n messages has
nothing to hide behind. Where all of a pass's terms would take ``max`` in an endless pipeline and ``sum`` one after the
other, n messages make it ``(1 - 1 / n) max + sum / n``. The host gives a GPU its work meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from piip_scale.engine.planning.cluster import Cluster
from piip_scale.engine.planning.work import RunWork
from piip_scale.engine.zero.plan import BYTES, Sharding, Sizes
from piip_scale.engine.zero.traffic import Collective

# Bytes of memory that pass for each element of a gradient, or of a slice of a sum, that is read and added to another.
_ADDED_BYTES = 12
# And for each element of a rank's slice in an update: gradient, master weight and both moments read, the latter three
# written, and the gradient read once more for its norm.
_UPDATE_BYTES = 32
_AVERAGE_BYTES = 8
_PREFETCHED = "stage3_prefetch_bucket_size"
_FP32_BYTES = 4


@dataclass(frozen=True)
class Phase:
    """Seconds of a part of a step.

    Attributes:
        name: ``forward``, ``backward`` (of micro-batches that differ, ``last backward``) or ``update``.
        times: That it comes in a step.
        compute: Of the device.
        inner: Of messages inside a node that can go on meanwhile.
        outer: Of those between nodes.
        pcie: Of copies between device and host.
        exposed: Of messages that computing waits for.
        host: Of the host.
        messages: Among which those that go on meanwhile are cut.
        asynchronous: See ``Cluster``.
    """

    name: str
    times: int
    compute: float
    inner: float = 0.0
    outer: float = 0.0
    pcie: float = 0.0
    exposed: float = 0.0
    host: float = 0.0
    messages: int = 1
    asynchronous: bool = True

    @property
    def device(self) -> float:
        """Without the host, and without what is exposed."""
        terms = (self.compute, self.inner, self.outer, self.pcie)
        cuts = max(self.messages, 1)
        return (1 - 1 / cuts) * max(terms) + sum(terms) / cuts

    @property
    def seconds(self) -> float:
        """One time."""
        work = max(self.device, self.host) if self.asynchronous else self.device + self.host
        return work + self.exposed

    @property
    def terms(self) -> dict[str, float]:
        """What would have to be faster, and its seconds."""
        return {
            "computing": self.compute,
            "links inside nodes": self.inner,
            "the network": self.outer,
            "PCIe": self.pcie,
            "messages that nothing hides": self.exposed,
            "the host": self.host,
        }

    @property
    def bound_by(self) -> str:
        """What takes longest."""
        return max(self.terms, key=self.terms.__getitem__)


@dataclass(frozen=True)
class StepTime:
    """The time of an optimiser step, as terms.

    Attributes:
        phases: What it is made of.
        parts: Seconds of a micro-batch that each part computes: forward, again, backward.
        images: Of a step, on all ranks.
        num_ranks: Ranks.
        model_flops: Of one image; see ``RunWork.model_flops``.
        peak_flops: Of a rank; 0 where it is not known.
    """

    phases: tuple[Phase, ...]
    parts: tuple[tuple[str, float, float, float], ...]
    images: int
    num_ranks: int
    model_flops: float
    peak_flops: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(phase.times * phase.seconds for phase in self.phases)

    @property
    def images_per_s(self) -> float:
        """On all ranks."""
        return self.images / self.seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs as a share of the peak; ``None`` where that is not known."""
        if not self.peak_flops:
            return None
        return self.model_flops * self.images_per_s / (self.num_ranks * self.peak_flops)

    @property
    def waits(self) -> dict[str, float]:
        """Seconds of each term in a step, whether or not they hide behind each other."""
        terms = [(phase.times, phase.terms) for phase in self.phases]
        return {name: sum(times * of_phase[name] for times, of_phase in terms) for name in terms[0][1]}

    @property
    def bound_by(self) -> str:
        """What most of the step waits for."""
        return max(self.phases, key=lambda phase: phase.times * phase.seconds).bound_by

    def of(self, name: str) -> float:
        """Seconds of all phases whose name ends so, in a step."""
        return sum(phase.times * phase.seconds for phase in self.phases if phase.name.endswith(name))


def step_time(
    work: RunWork,
    sizes: Sizes,
    sharding: Sharding,
    traffic: Sequence[Collective],
    cluster: Cluster,
) -> StepTime:
    """The time of a step.

    Args:
        work: What a rank computes for one image, and calls for a micro-batch.
        sizes: The model's.
        sharding: Its plan, whose DeepSpeed keys say micro-batch and accumulation.
        traffic: ``step_traffic`` of both.
        cluster: What all is reckoned with.
    """
    step = _Step(work, sizes, sharding, traffic, cluster)
    return StepTime(
        phases=tuple(step.phases()),
        parts=tuple(step.parts()),
        images=step.images * step.micros * cluster.num_ranks,
        num_ranks=cluster.num_ranks,
        model_flops=work.model_flops,
        peak_flops=cluster.peak_flops,
    )


class _Step:
    """The arithmetic of one step; seconds throughout."""

    def __init__(
        self, work: RunWork, sizes: Sizes, sharding: Sharding, traffic: Sequence[Collective], cluster: Cluster
    ) -> None:
        self._work, self._sharding, self._cluster = work, sharding, cluster
        self._traffic = traffic
        self.images: int = sharding.deepspeed["train_micro_batch_size_per_gpu"]
        self.micros: int = sharding.deepspeed["gradient_accumulation_steps"]
        self._trained = sum(p.numel for p in sizes.parameters if p.trainable)
        self._sharded_bytes = sum(p.num_bytes(sharding.precision) for p in sizes.parameters if sharding.shards(p))

    def parts(self) -> Iterable[tuple[str, float, float, float]]:
        memory = self._cluster.memory_bytes_per_s
        for part in self._work.parts:
            rate = self._cluster.fp32_flops if part.is_fp32 else self._cluster.flops
            forward = part.forward / rate + part.moved_forward / memory
            again = part.again / rate + part.moved_again / memory
            backward = part.backward / rate + (part.moved_backward - part.moved_again) / memory
            yield part.name, self.images * forward, self.images * again, self.images * backward

    def phases(self) -> Iterable[Phase]:
        """Micro-batches that send the same are one phase."""
        for name, special, rest in (("forward", "first", "later"), ("backward", "last", "")):
            common = self._sent(name, "every")
            differs = self.micros > 1 and self._sent(name, special) + self._sent(name, rest)
            if not differs:
                yield self._pass(name, self.micros, common + self._sent(name, special))
                continue
            yield self._pass(f"{special} {name}", 1, common + self._sent(name, special))
            yield self._pass(name, self.micros - 1, common + self._sent(name, rest))
        yield self._update()

    def _sent(self, name: str, when: str) -> list[Collective]:
        """Messages of a pass; those that nothing hides, of every micro-batch, end its backward pass."""
        in_pass = (name, "") if name == "backward" else (name,)
        return [each for each in self._traffic if each.overlaps in in_pass and each.when == when]

    def _pass(self, name: str, times: int, sent: Sequence[Collective]) -> Phase:
        parts, backward = list(self.parts()), name.endswith("backward")
        compute = sum(again + back if backward else forward for _, forward, again, back in parts)
        if backward:
            compute += self._gradient_bytes / self._cluster.memory_bytes_per_s
        operators = self._work.operators[backward]
        hidden = list(filter(self._hides, sent))
        return Phase(
            name=name,
            times=times,
            compute=compute,
            inner=sum(map(self._inner, hidden)),
            outer=sum(map(self._outer, hidden)),
            pcie=self._copied(backward=backward) / self._cluster.pcie.bytes_per_s,
            exposed=sum(max(self._inner(each), self._outer(each)) for each in sent if each not in hidden),
            host=operators * self._cluster.operator_s + self._sending(sent),
            messages=sum(each.messages for each in hidden) or 1,
            asynchronous=self._cluster.asynchronous,
        )

    def _hides(self, each: Collective) -> bool:
        """Whether computing goes on meanwhile: a gather is begun before its weights are needed, if it may be."""
        keys = self._sharding.deepspeed["zero_optimization"]
        waits = each.kind == "all-gather" and keys.get(_PREFETCHED) == 0
        return bool(each.overlaps) and self._cluster.transport.hides[each.kind] and not waits

    def _update(self) -> Phase:
        sent = [each for each in self._traffic if each.when == "update"]
        slices = self._slices if self._sharding.stage else self._trained
        num_bytes = slices * (_UPDATE_BYTES + _AVERAGE_BYTES * self._sharding.averaged)
        compute, pcie = num_bytes / self._cluster.memory_bytes_per_s, 0.0
        if self._sharding.zero.offload_optimizer != "none":
            # All ranks of a node share its memory; what is new goes back to the device.
            compute = num_bytes * self._cluster.ranks_per_node / self._cluster.host_bytes_per_s
            pcie = slices * BYTES[self._sharding.precision] / self._cluster.pcie.bytes_per_s
        if self._sharding.stage < 2:
            compute += self._summed_bytes / self._cluster.memory_bytes_per_s
        exposed = sum(max(self._inner(each), self._outer(each)) for each in sent)
        return Phase(
            name="update",
            times=1,
            compute=compute,
            pcie=pcie,
            exposed=exposed,
            host=self._sending(sent),
            asynchronous=self._cluster.asynchronous,
        )

    def _sending(self, sent: Iterable[Collective]) -> float:
        """Of the host, for one time."""
        cluster = self._cluster
        return sum(cluster.message_s * each.messages + self._bytes(each) / cluster.socket_bytes_per_s for each in sent)

    @property
    def _slices(self) -> float:
        """Trained elements whose state a rank holds."""
        return self._trained / self._sharding.num_ranks

    @property
    def _gradient_bytes(self) -> float:
        """On a gradient's way in a micro-batch."""
        if self._sharding.stage >= 2:
            return self._summed_bytes
        # In float32 the first of a step is not added to anything: it stays where autograd makes it.
        additions = self.micros - (self._sharding.precision == "fp32")
        return _ADDED_BYTES * self._trained * additions / self.micros

    @property
    def _summed_bytes(self) -> float:
        """On the way of all gradients into messages, and of this rank's slice of the sums out of them."""
        message = BYTES[self._sharding.zero.reduce_dtype if self._sharding.precision == "bf16" else "fp32"]
        slices = self._slices if self._sharding.stage else self._trained
        return self._trained * (BYTES[self._sharding.precision] + message) + slices * _ADDED_BYTES

    def _copied(self, *, backward: bool) -> float:
        """Bytes between device and host in a pass: slices of weights for gathers, gradients to be kept there."""
        zero = self._sharding.zero
        weights = self._sharded_bytes / self._sharding.num_ranks if zero.offload_parameters != "none" else 0.0
        return weights + (_FP32_BYTES * self._slices if backward and zero.offload_optimizer != "none" else 0.0)

    def _inner(self, each: Collective) -> float:
        """Of the links inside a node, for one time."""
        together, latency = each.together(self._cluster.ranks_per_node), 0.0
        if together == 1:
            return 0.0
        if together == each.num_ranks:
            latency = self._latency(each)
        return self._bytes(each) / self._cluster.inner.bytes_per_s + latency

    def _outer(self, each: Collective) -> float:
        """Of those between nodes, for one time: all groups' messages leave through them."""
        together = each.together(self._cluster.ranks_per_node)
        if together == each.num_ranks:
            return 0.0
        groups = self._cluster.ranks_per_node / together
        return groups * self._bytes(each) / self._cluster.outer.bytes_per_s + self._latency(each)

    def _bytes(self, each: Collective) -> float:
        """That one rank passes on for one time."""
        passes = self._cluster.transport.passes[each.kind]
        return passes * (each.num_ranks - 1) / each.num_ranks * each.num_bytes

    def _latency(self, each: Collective) -> float:
        """Of all hops of all messages of one time: a part goes round the ring, over as many nodes as there are."""
        hops = each.num_ranks - 1
        outer = 0
        if (together := each.together(self._cluster.ranks_per_node)) < each.num_ranks:
            outer = min(hops, each.num_ranks // together)
        once = outer * self._cluster.outer.latency_s + (hops - outer) * self._cluster.inner.latency_s
        return each.messages * self._cluster.transport.passes[each.kind] * once
