"""What the optimiser needs to know of a model's parameters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterRule:
    """How the optimiser treats one parameter.

    Attributes:
        layer_id: 0 for embeddings ... ``num_layers + 1`` for heads; rate is base * decay ** (num_layers + 1 - id).
            May be fractional for a shallow branch beside a deep one.
        decays: Whether weight decay applies.
        fresh: Whether it lies outside the branches, or is an addition to one: no backbone's pretraining has trained it.
    """

    layer_id: float
    decays: bool
    fresh: bool
