"""Frozen linear layers whose weights are stored in 8 bits, and float weights on their way into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from piip_scale.config.branches import VitBranchConfig
from piip_scale.geometry import num_frozen_blocks
from piip_scale.models.branch import Branch
from piip_scale.models.layers import Linear
from piip_scale.ops.stored_linear import store

WEIGHT, SCALE = "weight", "weight_scale"
"""Names of a layer's parameters."""


def store_frozen(branch: Branch, config: VitBranchConfig) -> None:
    """Has the linear layers of a branch's frozen blocks hold their weights as its ``frozen_dtype`` says."""
    if config.frozen_dtype == "run":
        return
    frozen = num_frozen_blocks(config.sections, config.frozen_blocks)
    for block in list(branch.blocks) if config.lora is not None else list(branch.blocks)[:frozen]:
        for layer in block.modules():
            if isinstance(layer, Linear):
                layer.store_weight(config.frozen_dtype)


class StoredWeights(Mapping[str, Tensor]):
    """Weights in the form that a model holds them in: what it stores in 8 bits is made so when it is asked for.

    Args:
        model: The model, or a network, on any device.
        weights: By the model's names, with or without ``weight_scale``; weights that are stored already stay.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._kinds = {
            f"{prefix}.{WEIGHT}": layer.stored
            for prefix, layer in model.named_modules()
            if isinstance(layer, Linear) and layer.stored is not None
        }
        scales = {name: _scale_of(name) for name in self._kinds if name in weights and _scale_of(name) not in weights}
        self._names = [*weights, *scales.values()]
        self._known = set(self._names)
        self._last: tuple[str, tuple[Tensor, Tensor]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        weight = f"{name.removesuffix(SCALE)}{WEIGHT}" if name.endswith(f".{SCALE}") else name
        if weight not in self._kinds or (name in self._weights and not self._weights[name].is_floating_point()):
            return self._weights[name]
        if name != weight and name in self._weights:
            return self._weights[name]
        # Converting reads in several threads: another may set the last one anew before this one has taken its own.
        last = self._last
        if last is None or last[0] != weight:
            self._last = last = weight, store(self._weights[weight], self._kinds[weight])
        return last[1][name != weight]

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _scale_of(weight: str) -> str:
    return f"{weight.removesuffix(WEIGHT)}{SCALE}"
