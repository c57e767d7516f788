"""Arithmetic forward and backward: the one rule by which a training's model FLOPs are counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FLOPS_PER_MAC = 2


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of one image.

    The model FLOPs of a training step are two for each multiply-accumulate, forward and backward. What a backward pass
    computes of a product follows from what is trained, exactly as autograd decides it:

    - the gradient of its weights, as much as forward, where they are trained;
    - the gradient of its input, as much as forward, where anything upstream of it is trained; images never are;
    - both gradients of a product of two activations (attention), twice as much as forward, where either has one.

    Norms, activations and the optimiser are left out, and so is what checkpointed blocks compute a second time: that
    is hardware FLOPs. What stochastic depth skips is not computed, so it does not count.

    Attributes:
        forward: Of the forward pass.
        backward: Of the backward pass.
    """

    forward: int = 0
    backward: int = 0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(self.forward + other.forward, self.backward + other.backward)

    def of_share(self, share: float) -> Work:
        """The mean over a batch of which only this share is computed."""
        return self if share == 1 else Work(round(self.forward * share), round(self.backward * share))

    @property
    def training_flops(self) -> int:
        """Of one image in a training step."""
        return FLOPS_PER_MAC * (self.forward + self.backward)


NOTHING = Work()


def layer(macs: int, *, trained: bool = True, upstream: bool = True) -> Work:
    """A product of an input and weights.

    Args:
        macs: Forward.
        trained: The weights have a gradient.
        upstream: The input has one.
    """
    return Work(macs, macs * (trained + upstream))


def product(macs: int, *, upstream: bool = True) -> Work:
    """A product of two activations, both computed from the same input.

    Args:
        macs: Forward.
        upstream: They have a gradient.
    """
    return Work(macs, 2 * macs * upstream)


def total(works: Iterable[Work]) -> Work:
    """All of them together."""
    return sum(works, NOTHING)
