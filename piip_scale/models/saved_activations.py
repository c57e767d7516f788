"""What a module keeps for its backward pass, and what is alive in it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class HeadBytes:
    """Of a call, or of one micro-batch in all of neck and heads.

    Attributes:
        kept: When the forward pass ends, for the backward pass.
        most: That the backward pass of these alone holds, what is kept included.
    """

    kept: int
    most: int


class AliveBytes(TorchDispatchMode):
    """Follows the memory behind every tensor that is made, from its first operator to its end.

    Args:
        others: Tensors whose memory is not counted.

    Attributes:
        now: Bytes.
        most: That there were.
    """

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in others)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self.call(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls an operator."""
        return func(*args, **kwargs)

    def change(self, num_bytes: int, part: str) -> None:
        """Some come, or go, of those that a part made."""
        self.now += num_bytes
        self.most = max(self.most, self.now)

    @property
    def making(self) -> str:
        """The part that makes tensors now."""
        return ""

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        weakref.finalize(storage, self.change, -storage.nbytes(), self.making)
        self.change(storage.nbytes(), self.making)


def bytes_in_turn(calls: Iterable[HeadBytes]) -> HeadBytes:
    """Of calls that follow each other: each one's backward pass finds what those before it keep."""
    kept = most = 0
    for call in calls:
        most = max(most, kept + call.most)
        kept += call.kept
    return HeadBytes(kept, max(most, kept))


def bytes_both_ways(module: nn.Module, given: Tensor) -> HeadBytes:
    """What a module keeps of a call, and the most on the way back to what it is given, on any device.

    Gradients of its parameters are left out: they are on their way to somebody else.

    Args:
        module: The module; it returns a tensor, or several.
        given: Has a gradient; it is not counted.
    """
    with AliveBytes([given, *module.parameters(), *module.buffers()]) as alive:
        output, kept = saved_for_backward(module, given)
        outputs = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        ones = [torch.ones_like(tensor) for tensor in outputs]
        before, alive.most = alive.now, alive.now
        # ``torch.autograd.grad`` itself would put the mode aside meanwhile.
        _engine_run_backward(tuple(outputs), tuple(ones), False, False, (given,), True, accumulate_grad=False)
    # The gradients that it begins with, which are counted in ``before``, go as soon as there are others.
    return HeadBytes(kept, kept + alive.most - before)


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
