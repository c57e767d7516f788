"""Predicting over the validation set, sharded or not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from piip_scale.engine.zero.deepspeed_api import Engine, begin_pass
from piip_scale.tasks.base import Task


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
    """
    metric = task.build_metric()
    engine.eval()
    with torch.no_grad(), warnings.catch_warnings():
        # DeepSpeed's backward hooks sit on every module, also where there is no backward pass to hook.
        warnings.filterwarnings("ignore", message="For backward hooks to be called")
        for batch in task.val_batches():
            if not goes_on():
                engine.train()
                return None
            moved = batch.to(device)
            begin_pass(engine)
            metric.update(moved, engine.module.predict(moved))
    engine.train()
    return metric.compute()
