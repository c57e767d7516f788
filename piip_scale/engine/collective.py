"""Small agreements between ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from piip_scale.errors import RunError

_DIGEST_BYTES = 7


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. Collective; the same on every rank. Waits for the device unless alone."""
    if dist.get_world_size() == 1:
        return flag
    flags = torch.tensor([int(flag)], device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def require_same(what: str, value: str, fix: str) -> None:
    """Holds ranks to have the same of something each found for itself. Collective.

    Raises:
        RunError: They have not, on every rank.
    """
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, value)
    others = [rank for rank, theirs in enumerate(everyones) if theirs != everyones[0]]
    if others:
        raise RunError(
            f"{what} of rank {others[0]} differ from those of rank 0",
            value=everyones[others[0]],
            rule=f"rank 0 has {everyones[0]!r}",
            fix=fix,
        )


def mean_over_ranks(values: Mapping[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Means of named numbers, each over the ranks that have it: a head that was skipped has no losses. Collective.

    Args:
        values: This rank's; tensors are scalars of any dtype and device.
        device: Through which ranks exchange them.
    """
    names, is_alone = sorted(values), dist.get_world_size() == 1
    # The lists of all ranks grow with them, so they are only exchanged where they differ.
    if not (is_alone or _is_same(json.dumps(names), device)):
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, names)
        names = sorted(set().union(*everyones))
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers = [0.0 if name in tensors else float(values.get(name, 0.0)) for name in names]
    # Float64: pixels of an interval are more than float32 can count.
    packed = torch.tensor([numbers, [float(name in values) for name in names]], dtype=torch.float64).to(device)
    if tensors:
        place_of = {name: place for place, name in enumerate(names)}
        places = torch.tensor([place_of[name] for name in tensors])
        stacked = torch.stack([value.detach().double().reshape(()).to(device) for value in tensors.values()])
        packed[0].index_copy_(0, places.to(device), stacked)
    if not is_alone:
        dist.all_reduce(packed)
    return dict(zip(names, (packed[0] / packed[1]).tolist(), strict=True))


def _is_same(text: str, device: torch.device) -> bool:
    """Whether every rank gives the same text, by its digest. Collective."""
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest(), "big")
    least = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return bool((least[0] == -least[1]).item())


def count_collectives() -> int:
    """Messages among ranks that this process has begun, in all groups; 0 before there are any."""
    if not dist.is_initialized():
        return 0
    # torch 2.15 keeps both private; the flight recorder, which reports as much, is NCCL's only.
    groups: tuple[Any, ...] = tuple(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)
