"""What a run says of itself before its first step: where each parameter lives and what a rank pays."""

from __future__ import annotations

from dataclasses import dataclass

from piip_scale.engine.zero.plan import Part, Sharding, Sizes

_MIB = 2**20
_GRADIENT_BYTES = {(1, "bf16"): 6}


@dataclass(frozen=True)
class Bytes:
    """Bytes that one rank keeps for a part between steps, and where.

    Attributes:
        weights: In the precision of the forward pass, slices of sharded ones, hpZ's second copy among them.
        gradients: Accumulated, in fp32.
        optimizer: Adam's two moments, fp32 master weights where the weights are in bf16 or ZeRO copies them, and their
            running average where the run keeps one.
        host: The share of all three that offloading keeps in host memory or on a disk.
    """

    weights: float
    gradients: float
    optimizer: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer

    @property
    def device(self) -> float:
        """Those on the device."""
        return self.total - self.host


def bytes_per_rank(part: Part, plan: Sharding) -> Bytes:
    """The arithmetic of ZeRO for one part.

    Per element 2 or 4 bytes of weight, 4 of gradient, 8 of moments, 4 of masters, 4 of their average. ZeRO-3 keeps a
    slice of every parameter beside the whole resident ones; on a single rank they are the same memory. ZeRO-1 in bf16
    keeps the gradients of the backward pass beside the fp32 ones until the update.
    """
    share = 1 / plan.num_ranks
    trainable = sum(p.numel for p in part.parameters if p.trainable)
    slices, whole = _resident_weights(part, plan)
    state = 8 + (4 if plan.stage else 0) + (4 if plan.averaged else 0)
    optimizer = state * trainable * (share if plan.stage >= 1 else 1.0)
    gradients = _GRADIENT_BYTES.get((plan.stage, plan.precision), 4) * trainable * (share if plan.stage >= 2 else 1.0)
    moved = optimizer + gradients if plan.zero.offload_optimizer != "none" else 0.0
    return Bytes(
        weights=slices + whole,
        gradients=gradients,
        optimizer=optimizer,
        host=moved + (slices if plan.zero.offload_parameters != "none" else 0.0),
    )


def _resident_weights(part: Part, plan: Sharding) -> tuple[float, float]:
    """Bytes of the slices and of what stays whole."""
    total = sum(p.num_bytes(plan.precision) for p in part.parameters)
    if plan.stage < 3:
        return 0.0, float(total)
    sharded = sum(p.num_bytes(plan.precision) for p in part.parameters if plan.shards(p))
    second = sharded / plan.zero.node_partition if plan.zero.node_partition > 1 else 0.0
    whole = total - sharded if plan.num_ranks > 1 else 0
    return total / plan.num_ranks + second, float(whole)


def start_report(sizes: Sizes, plan: Sharding) -> list[str]:
    """Lines of a table: per part its parameters, how many stay whole, how many are sharded, MiB on each rank."""
    lines = [_title(plan), _cells("part", "parameters", "resident", "sharded", "frozen", "MiB a rank", "offloaded")]
    lines += [_row(part, plan) for part in sizes.parts]
    total = Part("total", sizes.parameters)
    lines.append(_row(total, plan))
    if plan.stage:
        bucket = plan.deepspeed["zero_optimization"]["reduce_bucket_size"]
        reduced = plan.zero.reduce_dtype
        lines.append(f"beside these: activations, and messages of up to {bucket:,} elements at a time")
        lines.append(f"gradients are summed over ranks in {reduced}, over micro-batches in fp32")
    if plan.stage == 3:
        lines.append(f"resident: parameters of at most {plan.threshold:,} elements; {plan.reason}")
    return lines


def _title(plan: Sharding) -> str:
    terms = [f"ZeRO stage {plan.stage} on {plan.num_ranks} rank{'s' if plan.num_ranks > 1 else ''}", plan.precision]
    if plan.num_replicas > 1:
        terms.append(f"{plan.num_replicas} replicas of so many")
    for name, place in (("optimiser", plan.zero.offload_optimizer), ("parameters", plan.zero.offload_parameters)):
        if place != "none":
            terms.append(f"{name} offloaded to {'host memory' if place == 'cpu' else place}")
    if plan.zero.node_partition > 1:
        terms.append(f"sharded parameters a second time on every {plan.zero.node_partition} ranks")
    return ", ".join(terms)


def _row(part: Part, plan: Sharding) -> str:
    sharded = sum(p.numel for p in part.parameters if plan.shards(p))
    frozen = sum(p.numel for p in part.parameters if not p.trainable)
    held = bytes_per_rank(part, plan)
    counts = (f"{count:,}" for count in (part.numel, part.numel - sharded, sharded, frozen))
    return _cells(part.name, *counts, f"{held.device / _MIB:,.1f}", f"{held.host / _MIB:,.1f}")


def _cells(name: str, *others: str) -> str:
    *counts, device, host = (f"{text:>14}" for text in others)
    return f"{name:<20}{''.join(counts)}{device[2:]}{host[2:]}"
