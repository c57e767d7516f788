"""What a rank computes and moves for a micro-batch, part by part: the work that a plan's time is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from piip_scale.config.model import PiipConfig
from piip_scale.models.counting import PartCount, recomputed_macs
from piip_scale.models.work import FLOPS_PER_MAC

# Bytes that pass through memory between products for each byte kept for the backward pass, in both passes: a block of
# InternViT-6B moves 805 MB beside its weights and keeps 107, ViT-H 1,250 and 154 (benchmarks/step.md), of which half is
# read and written by the products themselves, while they compute.
_MOVED_PER_KEPT = 4.0
_PASSES = ("forward", "backward", "again")
# A third of it in the forward pass.
_FORWARD_SHARE = 1 / 3


@dataclass(frozen=True)
class PartWork:
    """Of one part of the model, for one image.

    Attributes:
        name: Of the part.
        forward: FLOPs of the forward pass.
        backward: Of the backward pass.
        again: FLOPs of the forward pass that the backward pass computes again.
        kept: Bytes kept for the backward pass if nothing is computed again.
        kept_again: Of these, of what is computed again.
        is_fp32: It computes in float32 whatever the run's precision.
    """

    name: str
    forward: float
    backward: float
    again: float = 0.0
    kept: float = 0.0
    kept_again: float = 0.0
    is_fp32: bool = False

    @property
    def moved_forward(self) -> float:
        """Bytes between products of the forward pass."""
        return _FORWARD_SHARE * _MOVED_PER_KEPT * self.kept

    @property
    def moved_backward(self) -> float:
        """Of the backward pass, with what is computed again."""
        return (1 - _FORWARD_SHARE) * _MOVED_PER_KEPT * self.kept + self.moved_again

    @property
    def moved_again(self) -> float:
        """Of what is computed again."""
        return _FORWARD_SHARE * _MOVED_PER_KEPT * self.kept_again


@dataclass(frozen=True)
class RunWork:
    """Of a rank.

    Attributes:
        parts: For one image.
        operators: That the network calls for a micro-batch, forward and backward.
    """

    parts: tuple[PartWork, ...]
    operators: tuple[int, int]

    @property
    def model_flops(self) -> float:
        """Of one image in a training step, without neck and heads: what MFU counts."""
        return sum(part.forward + part.backward for part in self.parts if not part.is_fp32)


def run_work(
    model: PiipConfig,
    counted: tuple[tuple[PartCount, ...], tuple[PartCount, ...]],
    kept: Mapping[str, float],
    operators: tuple[int, int],
) -> RunWork:
    """Puts together what was counted and what was rehearsed.

    Args:
        model: The network.
        counted: ``Outline.counted()``.
        kept: Bytes of one image by part, nothing computed again.
        operators: Of a micro-batch as the run computes it.
    """
    network, heads = counted
    again = recomputed_macs(model, network) if network else ()
    by_group: dict[str, list[PartWork]] = {}
    for part, macs in zip(network, again, strict=True):
        by_group.setdefault(_group(part.name), []).append(_work(part, macs))
    for part in heads:
        by_group.setdefault("heads", []).append(_work(part, 0, is_fp32=True))
    return RunWork(tuple(_together(name, works, kept) for name, works in by_group.items()), operators)


def _group(name: str) -> str:
    return {"interaction": "interactions", "merging": "mergings", "head": "heads"}.get(name.rsplit(" ", 1)[0], name)


def _work(part: PartCount, again: int, *, is_fp32: bool = False) -> PartWork:
    forward, backward, repeated = (FLOPS_PER_MAC * macs for macs in (part.total_macs, part.backward_macs, again))
    return PartWork(part.name, forward, backward, repeated, is_fp32=is_fp32)


def _together(name: str, works: list[PartWork], kept: Mapping[str, float]) -> PartWork:
    forward, backward, again = (sum(getattr(work, pass_) for work in works) for pass_ in _PASSES)
    bytes_kept = kept.get(name, 0.0)
    share = again / forward if forward else 0.0
    return PartWork(name, forward, backward, again, bytes_kept, share * bytes_kept, works[0].is_fp32)
