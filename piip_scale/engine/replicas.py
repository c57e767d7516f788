"""Evaluating with a whole model on every rank: each image on one of them, what was found on rank 0 at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from piip_scale.agreement import LocalFault, apart, gathered
from piip_scale.data.batch import Batch
from piip_scale.errors import DataError, LostRankError
from piip_scale.run.reasons import has_lost_contact
from piip_scale.tasks.base import Metric, Task
from piip_scale.world import World

# Ranks meet once, when the slowest has predicted its last image.
_LONGEST = timedelta(days=30)

_Value = TypeVar("_Value")
Track = Callable[[Iterable[tuple[Batch, ...]], int], Iterable[tuple[Batch, ...]]]
"""Passes batches on, of so many, and shows how far they are."""


@contextmanager
def joined(world: World) -> Iterator[None]:
    """Connects the ranks, without DeepSpeed and without messages between GPUs; nothing for one alone. Collective.

    Raises:
        LostRankError: Another rank is gone, which it or its launcher reports.
    """
    if world.num_ranks == 1:
        yield
        return
    os.environ |= world.as_environment()
    address = f"tcp://{world.master_address}:{world.master_port}"
    dist.init_process_group("gloo", address, _LONGEST, world.num_ranks, world.rank)
    try:
        yield
    except RuntimeError as error:
        if not has_lost_contact(error):
            raise
        lost = LostRankError("another rank is gone", rule=str(error), fix="look above for why")
        lost.is_echo = True
        raise lost from error
    dist.destroy_process_group()


def together(function: Callable[[], _Value]) -> _Value:
    """What a function returns on this rank; where it fails on any, all fail, and one reports. Collective.

    Raises:
        Exception: What it raised here, where this rank is the first that failed.
        PiipError: What it raised on that one, marked as an echo.
    """
    fault, found = LocalFault(), list[_Value]()
    with fault.caught():
        found.append(function())
    fault.raise_once()
    return found[0]


def predicted(
    tasks: Sequence[Task], predict: Callable[[Sequence[Batch]], Sequence[Any]], device: torch.device, track: Track
) -> Metric:
    """The metric with this rank's predictions: ranks predict apart, in batches that are the same on any number of them.

    Args:
        tasks: Give this rank's batches, each at a scale of its own; the first one's metric is it.
        predict: What a model finds in the images of batches, one for each scale.
        device: Where batches go.
        track: Shows progress.

    Raises:
        PiipError: Data or predictions cannot be used.
    """
    metric = tasks[0].build_metric()
    with apart():
        batches = zip(*(task.own_val_batches() for task in tasks), strict=True)
        for of_scales in track(batches, tasks[0].num_own_val_batches()):
            moved = [batch.to(device) for batch in of_scales]
            metric.update(moved[0], predict(moved))
    return metric


def count_broken(task: Task, limit: float) -> int:
    """Images that could not be used, on all ranks. Collective; the same on every rank.

    Raises:
        DataError: They are more than the limit, on every rank.
    """

    def checked(total: int) -> int:
        if total > limit:
            raise DataError(
                "too many broken samples", value=total, rule=f"at most {limit:.6g}, by data.max_broken_share"
            )
        return total

    total = sum(gathered(task.num_broken_val_samples()))
    return together(lambda: checked(total))
