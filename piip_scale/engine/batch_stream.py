"""The micro-batches of one optimiser step after another, epoch after epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from piip_scale.config.run import TrainConfig
from piip_scale.data.batch import Batch
from piip_scale.errors import DataError
from piip_scale.tasks.base import Task


class BatchStream:
    """Feeds this rank; where it is follows from the step alone.

    Args:
        task: Gives an epoch's micro-batches.
        train: Length of the run and micro-batches of a step.
        device: Where batches go.

    Raises:
        DataError: An epoch is shorter than a step.
    """

    def __init__(self, task: Task, train: TrainConfig, device: torch.device) -> None:
        self._task, self._accumulation, self._device = task, train.gradient_accumulation, device
        # An epoch's last, incomplete step is left out: its gradient would weigh its images more.
        self.steps_per_epoch = task.num_train_batches() // self._accumulation
        if not self.steps_per_epoch:
            raise DataError(
                "an epoch has too few batches for one step",
                value=task.num_train_batches(),
                rule=f"train.gradient_accumulation={self._accumulation} micro-batches make a step, on every rank",
                fix="lower data.micro_batch_size, train.gradient_accumulation or the number of ranks, or add images",
            )
        self.total_steps = train.steps or (train.epochs or 0) * self.steps_per_epoch
        self._position: tuple[int, int] | None = None
        self._batches: Iterator[Batch] = iter(())
        self.wait_seconds = 0.0

    def step(self, step: int) -> Iterator[Batch]:
        """Yields the micro-batches of step ``step``, and adds to ``wait_seconds`` what they kept the step waiting.

        Raises:
            DataError: The loader has fewer batches than the task said.
        """
        epoch, first = divmod(step, self.steps_per_epoch)
        for micro in range(first * self._accumulation, (first + 1) * self._accumulation):
            before = time.perf_counter()
            batch = self._next(epoch, micro).to(self._device)
            self.wait_seconds += time.perf_counter() - before
            yield batch

    def keys(self, step: int) -> list[list[str]]:
        """The keys of the samples of step ``step``, by micro-batch of this rank; loads none of them."""
        epoch, first = divmod(step, self.steps_per_epoch)
        return self._task.train_keys(epoch, range(first * self._accumulation, (first + 1) * self._accumulation))

    def _next(self, epoch: int, micro: int) -> Batch:
        if self._position != (epoch, micro):
            self._batches = iter(self._task.train_batches(epoch, micro))
        self._position = (epoch, micro + 1)
        try:
            return next(self._batches)
        except StopIteration:
            raise DataError(
                f"the loader ended at micro-batch {micro} of epoch {epoch}",
                rule=f"it said it has {self._task.num_train_batches()} on every rank",
            ) from None
