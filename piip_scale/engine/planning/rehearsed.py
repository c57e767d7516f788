"""A network's sizes and activations, found once and scaled to the micro-batches of its plans."""

from __future__ import annotations

from functools import cached_property

from piip_scale.engine.rehearsal import Moment, Rehearsal, rehearse
from piip_scale.engine.zero.plan import measure
from piip_scale.models.counting import PartCount
from piip_scale.models.saved_activations import HeadBytes
from piip_scale.tasks.base import Outline


class Rehearsed:
    """An outline's sizes and activations, in bytes of so many images."""

    def __init__(self, outline: Outline, micro_batch_size: int) -> None:
        self.micro_batch_size = micro_batch_size
        self.sizes = measure(outline.model, outline.parts)
        self._outline = outline

    @cached_property
    def _found(self) -> tuple[Rehearsal, HeadBytes]:
        outline = self._outline
        found = rehearse(outline.network, outline.parts, outline.run)
        return found, outline.head_bytes(found.features)

    @property
    def kept(self) -> dict[str, int]:
        """At the end of the forward pass, by part."""
        rehearsal, of_heads = self._found
        heads = self._outline.heads
        return dict(rehearsal.kept) | {heads: rehearsal.kept.get(heads, 0) + of_heads.kept}

    @property
    def moments(self) -> tuple[Moment, ...]:
        """Of the backward pass: first the heads', whose gradients are handed over together, then the network's."""
        rehearsal, heads = self._found
        trained = sum(parameter.numel for parameter in self.sizes.parameters if parameter.trainable)
        of_heads = trained - sum(moment.numel for moment in rehearsal.moments)
        kept = rehearsal.total_bytes
        return (Moment(of_heads, kept + heads.most, kept), *rehearsal.moments)

    @property
    def operators(self) -> tuple[int, int]:
        """That the network calls in the forward pass, and in the backward pass."""
        return self._found[0].operators

    @cached_property
    def counted(self) -> tuple[tuple[PartCount, ...], tuple[PartCount, ...]]:
        """What one image costs: ``Outline.counted``."""
        return self._outline.counted()
