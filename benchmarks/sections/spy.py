"""Watches the collectives of a process where all of them pass: at torch's dispatcher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_NAMES = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
}


@dataclass(frozen=True)
class Message:
    """One collective as one rank calls it.

    Attributes:
        kind: all-gather, reduce-scatter ...
        elements: Of the whole message: what an all-gather makes, what the others take.
        num_bytes: Of those elements.
        inside: The watched module whose forward was running, if any.
        phase: As told by ``CollectiveSpy.phase``.
        ranks: Of its group, in the order of a ring of them.
    """

    kind: str
    elements: int
    num_bytes: int
    inside: str
    phase: str
    ranks: tuple[int, ...]

    def hop(self, rank: int) -> tuple[int, float]:
        """The next rank of a ring of the group, and the bytes that this one sends there."""
        position, size = self.ranks.index(rank), len(self.ranks)
        rounds = 2 if self.kind == "all-reduce" else 1
        return self.ranks[(position + 1) % size], rounds * (size - 1) * self.num_bytes / size


class CollectiveSpy(TorchDispatchMode):
    """While entered, keeps every collective of this thread in ``messages``.

    Attributes:
        messages: In the order of their calls.
        phase: Written into each message from now on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []
        self.phase = ""
        self._inside: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Notes a collective and lets everything through."""
        if func.namespace == "c10d" and func.__name__.split(".")[0] in _NAMES:
            self._note(_NAMES[func.__name__.split(".")[0]], args)
        return func(*args, **(kwargs or {}))

    def _note(self, kind: str, args: Sequence[Any]) -> None:
        sides = [tensors for tensors in (list(_tensors(arg)) for arg in args[:2]) if tensors]
        whole = max(sides, key=lambda tensors: sum(tensor.numel() for tensor in tensors))
        elements, num_bytes = sum(t.numel() for t in whole), sum(t.nbytes for t in whole)
        ranks = next(_group_ranks(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        self.messages.append(Message(kind, elements, num_bytes, "".join(self._inside[-1:]), self.phase, ranks))

    @contextmanager
    def watching(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Names the module of these that each message is called inside of."""
        handles = []
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._inside.append(name)))
            handles.append(module.register_forward_hook(lambda *_: self._leave()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self) -> None:
        self._inside.pop()


def _group_ranks(group: torch.ScriptObject) -> tuple[int, ...]:
    # The first object in each collective's arguments is its group.
    return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)
