"""Bringing together what the ranks found, for metrics."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

_Value = TypeVar("_Value")


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_main_rank() -> bool:
    """Whether this is rank 0, or alone."""
    return not is_distributed() or dist.get_rank() == 0


def gathered(value: _Value) -> list[_Value]:
    """Every rank's value, in the order of the ranks. Collective."""
    if not is_distributed():
        return [value]
    values: list[_Value | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # each place is filled
