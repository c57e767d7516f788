"""Predicting over the validation set, sharded or not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from piip_scale.agreement import LocalFault
from piip_scale.engine.collective import any_rank
from piip_scale.engine.zero.deepspeed_api import Engine, begin_pass
from piip_scale.tasks.base import Metric, Task


def evaluate(engine: Engine, task: Task, device: torch.device, goes_on: Callable[[], bool]) -> dict[str, float] | None:
    """The task's metrics of the current weights over its validation set. Collective; the same on every rank.

    Every rank must get equally many batches (``Task.val_batches`` sees to it): under ZeRO-3 each batch gathers
    parameters from all.

    Args:
        engine: The engine; it is back in training mode afterwards.
        task: Gives the batches and the metric.
        device: Where batches go.
        goes_on: Asked before every batch, and the same on every rank.

    Returns:
        The metrics, or ``None`` where ``goes_on`` ended it.

    Raises:
        PiipError: A rank's data or predictions cannot be used, on every rank; on that one, an error of any type. What
            the network itself raises is raised on its rank alone: the others are in the midst of its collectives.
    """
    engine.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # DeepSpeed's backward hooks sit on every module, also where there is no backward pass to hook.
            warnings.filterwarnings("ignore", message="For backward hooks to be called")
            metric = _predicted(engine, task, device, goes_on)
    finally:
        engine.train()
    return None if metric is None else metric.compute()


def _predicted(engine: Engine, task: Task, device: torch.device, goes_on: Callable[[], bool]) -> Metric | None:
    """The metric with all predictions; ``None`` where ``goes_on`` ended it."""
    fault, metric = LocalFault(), None
    batches: Iterator[Any] = iter(())
    with fault.caught():
        metric, batches = task.build_metric(), iter(task.val_batches())
    while True:
        batch = None
        with fault.caught():
            batch = next(batches, None)
            batch = None if batch is None else batch.to(device)
        # A flag first: errors are seldom, and gathering objects takes a message for their lengths as well.
        if any_rank(bool(fault), device):
            fault.raise_together()
        if batch is None:
            return metric
        if not goes_on():
            return None
        begin_pass(engine)
        predictions = engine.module.predict(batch)
        with fault.caught():
            assert metric is not None
            metric.update(batch, predictions)
