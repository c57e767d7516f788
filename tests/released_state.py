"""A model's tensors as the released code names them, by the functions that exporting uses one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from piip_scale.config.model import PiipConfig
from piip_scale.models.released import released_name, released_network, released_shape


def to_released(state: Mapping[str, Tensor], config: PiipConfig) -> dict[str, Tensor]:
    """Views, where there is something to view, by their released names and shapes."""
    network, found = released_network(config), {}
    for name, tensor in state.items():
        key = released_name(name, network)
        found[key] = tensor.reshape(released_shape(key, tuple(tensor.shape)))
    return found
