"""What a run says of itself before its first step: where each parameter lives and what a rank pays."""

from __future__ import annotations

from dataclasses import dataclass

from piip_scale.engine.zero import Part, Sharding, Sizes

_MIB = 2**20
_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Bytes:
    """Bytes that one rank keeps for a part between steps.

    Attributes:
        weights: In the precision of the forward pass, slices of sharded ones.
        gradients: Accumulated, in fp32.
        optimizer: Adam's two moments, and fp32 master weights where the weights are in bf16 or ZeRO copies them.
    """

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer


def bytes_per_rank(part: Part, plan: Sharding) -> Bytes:
    """The arithmetic of ZeRO for one part: per element 2 or 4 of weight, 4 of gradient, 8 and 4 of optimiser.

    ZeRO-3 keeps a slice of every parameter beside the whole resident ones.
    """
    share = 1 / plan.num_ranks
    trainable = sum(p.numel for p in part.parameters if p.trainable)
    sharded = sum(p.numel for p in part.parameters if plan.shards(p))
    kept = part.numel * share + (part.numel - sharded) if plan.stage == 3 else float(part.numel)
    master = 4 if plan.stage else 0
    return Bytes(
        weights=kept * _BYTES[plan.precision],
        gradients=4 * trainable * (share if plan.stage >= 2 else 1.0),
        optimizer=(8 + master) * trainable * (share if plan.stage >= 1 else 1.0),
    )


def start_report(sizes: Sizes, plan: Sharding) -> list[str]:
    """Lines of a table: per part its parameters, how many stay whole, how many are sharded, MiB on each rank."""
    lines = [
        f"ZeRO stage {plan.stage} on {plan.num_ranks} rank{'s' if plan.num_ranks > 1 else ''}, {plan.precision}",
        f"{'part':<20}{'parameters':>14}{'resident':>14}{'sharded':>14}{'frozen':>14}{'MiB a rank':>12}",
    ]
    lines += [_row(part, plan) for part in sizes.parts]
    total = Part("total", sizes.parameters)
    lines.append(_row(total, plan))
    if plan.stage == 3:
        lines.append(f"resident: parameters of at most {plan.threshold:,} elements; {plan.reason}")
    return lines


def _row(part: Part, plan: Sharding) -> str:
    sharded = sum(p.numel for p in part.parameters if plan.shards(p))
    frozen = sum(p.numel for p in part.parameters if not p.trainable)
    mib = bytes_per_rank(part, plan).total / _MIB
    return f"{part.name:<20}{part.numel:>14,}{part.numel - sharded:>14,}{sharded:>14,}{frozen:>14,}{mib:>12,.1f}"
