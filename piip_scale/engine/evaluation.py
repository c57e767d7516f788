"""Predicting over the validation set, sharded or not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from piip_scale.agreement import LocalFault
from piip_scale.engine.collective import any_rank
from piip_scale.engine.zero.deepspeed_api import Engine, begin_pass
from piip_scale.tasks.base import Metric, Task, Watched
from piip_scale.telemetry.records import EvaluationRecord


def evaluate(engine: Engine, task: Task, device: torch.device, goes_on: Callable[[], bool]) -> EvaluationRecord | None:
    """What the current weights find in the task's validation set. Collective.

    Every rank must get equally many batches (``Task.val_batches`` sees to it): under ZeRO-3 each batch gathers
    parameters from all.

    Args:
        engine: The engine; it is back in training mode afterwards.
        task: Gives the batches and the metric.
        device: Where batches go.
        goes_on: Asked before every batch, and the same on every rank.

    Returns:
        The metrics, the same on every rank, and on rank 0 curves and pictures; ``None`` where ``goes_on`` ended it.

    Raises:
        PiipError: A rank's data or predictions cannot be used, on every rank; on that one, an error of any type. What
            the network itself raises is raised on its rank alone: the others are in the midst of its collectives.
    """
    engine.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # DeepSpeed's backward hooks sit on every module, also where there is no backward pass to hook.
            warnings.filterwarnings("ignore", message="For backward hooks to be called")
            found = _predicted(engine, task, device, goes_on)
    finally:
        engine.train()
    if found is None:
        return None
    metric, watched = found
    return EvaluationRecord(metric.compute(), metric.pr_curves(), watched.pictures())


def _predicted(
    engine: Engine, task: Task, device: torch.device, goes_on: Callable[[], bool]
) -> tuple[Metric, Watched] | None:
    """The metric with all predictions, and those of the watched images; ``None`` where ``goes_on`` ended it."""
    fault, found = LocalFault(), list[tuple[Metric, Watched]]()
    batches: Iterator[Any] = iter(())
    with fault.caught():
        found.append((task.build_metric(), task.watched()))
        batches = iter(task.val_batches())
    while True:
        batch = None
        with fault.caught():
            batch = next(batches, None)
            batch = None if batch is None else batch.to(device)
        # A flag first: errors are seldom, and gathering objects takes a message for their lengths as well.
        if any_rank(bool(fault), device):
            fault.raise_together()
        if batch is None:
            return found[0]
        if not goes_on():
            return None
        begin_pass(engine)
        predictions = engine.module.predict(batch)
        with fault.caught():
            metric, watched = found[0]
            metric.update(batch, predictions)
            watched.keep(predictions)
