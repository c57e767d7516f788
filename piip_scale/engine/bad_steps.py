"""Writes down what a step that was not applied was made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from piip_scale.agreement import gathered_on_main
from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.engine.batch_stream import BatchStream
from piip_scale.engine.hooks import Sink
from piip_scale.engine.trainer import StepReport
from piip_scale.run.bad_steps import BadStep, RankOfBadStep, write_bad_step
from piip_scale.run.run_dir import RunDirectory
from piip_scale.telemetry.records import total_of


class KeepBadSteps:
    """Keeps keys and losses of all ranks of each step that was not applied, and says so in one event.

    Ranks exchange something after such a step alone, which all of them know of already.

    Args:
        sink: Gets the event.
        run: Takes the file.
        stream: Knows which samples a step has.
        config_sha256: Of the run's config file, on the main rank.
    """

    doing = "keeping a bad step"

    def __init__(self, sink: Sink, run: RunDirectory, stream: BatchStream, config_sha256: str) -> None:
        self._sink, self._run, self._stream, self._config_sha256 = sink, run, stream, config_sha256

    def after_step(self, report: StepReport) -> None:
        """Every rank takes part, where the step was not applied."""
        if report.result.applied:
            return
        own = RankOfBadStep(report.result.host_losses, report.max_loss, self._stream.keys(report.step - 1))
        ranks = gathered_on_main(own)
        if ranks:
            self._keep(report, ranks)

    def _keep(self, report: StepReport, ranks: list[RankOfBadStep]) -> None:
        earlier = [step for step in CheckpointStore(self._run.checkpoints, keep=1).steps() if step <= report.step]
        reason = reason_of(ranks)
        bad = BadStep(
            report.step,
            reason,
            report.result.grad_norm,
            ranks,
            earlier[-1] if earlier else None,
            self._config_sha256,
        )
        path = write_bad_step(self._run, bad)
        self._sink.warning(report.step, f"step not applied: {reason}; see {path.relative_to(self._run.path)}")

    def at_stop(self, step: int) -> None:
        """Nothing is left to do."""

    def at_end(self, step: int) -> None:
        """Nothing is left to do."""


def reason_of(ranks: Sequence[RankOfBadStep]) -> str:
    """Why a step was not applied, in words."""
    totals = [total_of(rank.losses) for rank in ranks]
    infinite = [str(number) for number, total in enumerate(totals) if not math.isfinite(total)]
    if infinite:
        return f"the loss of rank {', '.join(infinite)} was not finite"
    for number, (rank, total) in enumerate(zip(ranks, totals, strict=True)):
        if abs(total) > rank.max_loss:
            return f"the loss of rank {number} was {total:.4g}, above train.max_loss_ratio's {rank.max_loss:.4g}"
    return "its gradient was not finite"
