"""Small agreements between ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from piip_scale.errors import PiipError

T = TypeVar("T")


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. Collective; the same on every rank."""
    flags = torch.tensor([int(flag)], device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of named scalars over all ranks, in one message. Collective; every rank has the same names."""
    names = sorted(values)
    packed = torch.stack([values[name].detach().float().reshape(()) for name in names])
    dist.all_reduce(packed)
    return dict(zip(names, (packed / dist.get_world_size()).tolist(), strict=True))


def on_main(function: Callable[[], T]) -> T:
    """Runs a function on rank 0 and gives every rank its result, or its error. Collective.

    Args:
        function: Returns something small that pickles.

    Raises:
        PiipError: What the function raised on rank 0, the same on every rank, so that nobody waits for the others.
    """
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except PiipError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result
