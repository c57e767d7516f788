"""What a module keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def saved_for_backward(module: nn.Module, *inputs: Any) -> tuple[Any, int]:
    """Calls a module on any device, the meta device included.

    Args:
        module: The module.
        inputs: What to call it with; they are not counted.

    Returns:
        Its output, and the bytes that autograd saves of the call, weights that it saves included.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    given = {tensor.untyped_storage()._cdata for value in inputs for tensor in _tensors(value)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(*inputs)
    return output, sum(storage.nbytes() for place, storage in storages.items() if place not in given)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
