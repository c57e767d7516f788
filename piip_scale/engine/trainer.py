"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from piip_scale.config.run import RunConfig
from piip_scale.data.batch import Batch
from piip_scale.engine.batch_stream import BatchStream
from piip_scale.engine.collective import any_rank
from piip_scale.engine.loss_trend import LossTrend
from piip_scale.engine.optim import set_learning_rate
from piip_scale.engine.schedule import lr_factor
from piip_scale.engine.step import LARGEST_LOSS, StepResult, train_step
from piip_scale.engine.stop import StopFlag
from piip_scale.engine.zero.deepspeed_api import Engine
from piip_scale.errors import Interrupted, RunError
from piip_scale.run.heartbeat import COMPUTING, WAITING, Heartbeat
from piip_scale.world import World


@dataclass(frozen=True)
class StepReport:
    """One step as hooks see it.

    Attributes:
        step: Steps behind the run with this one.
        result: What it did.
        lr: Base rate it used.
        seconds: Wall time of it, waiting for the loader included and hooks left out.
        wait_seconds: The part spent waiting for the loader.
        max_loss: The largest loss that this rank would have taken.
    """

    step: int
    result: StepResult
    lr: float
    seconds: float
    wait_seconds: float
    max_loss: float = LARGEST_LOSS


class Hook(Protocol):
    """Something done beside the steps. Every rank calls every hook, in the same order.

    Attributes:
        doing: What a rank does in it, for those who wait.
    """

    doing: str

    def after_step(self, report: StepReport) -> None:
        """After each step."""
        ...

    def at_stop(self, step: int) -> None:
        """Once, when the run was asked to stop after ``step`` steps."""
        ...

    def at_end(self, step: int) -> None:
        """Once, after the last step."""
        ...


class Trainer:
    """Trains from ``first_step`` to the end, or until asked to stop. All methods are collective.

    Args:
        engine: The engine.
        stream: The batches.
        config: The run.
        world: The ranks.
        device: This rank's.
        stop: The flag that signals set.
        hooks: What happens beside the steps, in this order.
        heartbeat: Where this rank reports its progress.
        first_step: Steps done before.
    """

    def __init__(
        self,
        engine: Engine,
        stream: BatchStream,
        config: RunConfig,
        world: World,
        device: torch.device,
        stop: StopFlag,
        hooks: Sequence[Hook],
        heartbeat: Heartbeat,
        first_step: int = 0,
    ) -> None:
        self.step = first_step
        self._engine, self._stream, self._config = engine, stream, config
        self._world, self._device, self._stop, self._hooks = world, device, stop, hooks
        self._heartbeat = heartbeat
        self._skipped_in_a_row = 0
        self._trend = LossTrend(config.train)

    def run(self) -> None:
        """Trains.

        Raises:
            Interrupted: A signal asked some rank to stop; hooks have saved.
            RunError: Too many steps in a row were not applied.
        """
        while self.step < self._stream.total_steps:
            report = self._train_step()
            for hook in self._next_hooks():
                hook.after_step(report)
            self._check_progress(report)
            self._leave_if_asked()
        for hook in self._next_hooks():
            hook.at_end(self.step)

    def _train_step(self) -> StepReport:
        started, waited = time.perf_counter(), self._stream.wait_seconds
        config = self._config
        lr = config.optimizer.lr * lr_factor(config.schedule, self.step, self._stream.total_steps)
        set_learning_rate(self._engine.optimizer.param_groups, lr)
        batches = self._marked(self._stream.step(self.step))
        max_loss = self._trend.limit
        max_sum = min(max_loss * config.train.gradient_accumulation, LARGEST_LOSS)
        result = train_step(self._engine, batches, self.step, config.train.seed, self._world, max_sum)
        if result.applied:
            self._trend.add(result.host_losses)
        self.step += 1
        seconds = time.perf_counter() - started
        return StepReport(self.step, result, lr, seconds, self._stream.wait_seconds - waited, max_loss)

    def _marked(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        self._heartbeat.mark(WAITING, self.step)
        for batch in batches:
            self._heartbeat.mark(COMPUTING, self.step)
            yield batch
            self._heartbeat.mark(WAITING, self.step)

    def _next_hooks(self) -> Iterator[Hook]:
        for hook in self._hooks:
            self._heartbeat.mark(hook.doing, self.step)
            yield hook

    def _check_progress(self, report: StepReport) -> None:
        self._skipped_in_a_row = 0 if report.result.applied else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= self._config.train.max_skipped_steps:
            raise RunError(
                f"the loss or the gradient was not finite{self._or_too_large} in {self._skipped_in_a_row} steps in a "
                f"row, the last of them step {self.step}",
                rule=f"train.max_skipped_steps={self._config.train.max_skipped_steps}",
                fix="see bad_steps/ and piip-scale replay for what was not finite; lower optimizer.lr, lengthen "
                "schedule.warmup_steps or set optimizer.clip_grad_norm, then --resume",
            )

    @property
    def _or_too_large(self) -> str:
        return "" if self._config.train.max_loss_ratio is None else ", or the loss too large,"

    def _leave_if_asked(self) -> None:
        # Ranks see a signal in different steps; one that left alone would leave the others waiting for it.
        if not any_rank(bool(self._stop), self._device) or self.step == self._stream.total_steps:
            return
        for hook in self._next_hooks():
            hook.at_stop(self.step)
        raise Interrupted(
            f"stopped as asked after step {self.step} of {self._stream.total_steps}, and saved",
            fix="continue with the same command and --resume",
        )
