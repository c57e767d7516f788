"""What happens beside the steps: logging, averaging, evaluating, saving."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.collective import mean_over_ranks
from piip_scale.engine.ema import WeightAverage
from piip_scale.engine.first_save import FirstSave
from piip_scale.engine.interval import Interval
from piip_scale.engine.trainer import StepReport
from piip_scale.engine.utilisation import Utilisation
from piip_scale.errors import Interrupted
from piip_scale.run.progress_notes import ProgressNotes
from piip_scale.run.run_dir import State
from piip_scale.run.starting import StartClock
from piip_scale.telemetry.memory import GIB, memory_now_bytes, peak_memory_bytes
from piip_scale.telemetry.records import EvaluationRecord, IntervalRecord, SaveRecord, StartRecord, StepRecord
from piip_scale.world import World

# Beside the losses, which saves a collective of its own.
_BROKEN = "broken samples"


def ignore_step(_step: int) -> None:
    """Where nobody notes it."""


class Sink(Protocol):
    """Where a run logs what happens: ``Telemetry`` on the main rank, ``Silence`` on the others."""

    def step(self, record: StepRecord) -> None:
        """One optimiser step."""
        ...

    def evaluation(self, step: int, record: EvaluationRecord) -> None:
        """What an evaluation found."""
        ...

    def start(self, record: StartRecord) -> None:
        """The way to the first step."""
        ...

    def save(self, record: SaveRecord) -> None:
        """A checkpoint that is visible now."""
        ...

    def event(self, step: int, text: str) -> None:
        """Anything else."""
        ...

    def warning(self, step: int, text: str) -> None:
        """Anything else that went wrong."""
        ...

    def ending(self, step: int, text: str) -> None:
        """How the run ends, where a rank reports that to its user."""
        ...

    def close(self, state: State = "stopped") -> None:
        """The end, and how the run came to it."""
        ...


class Silence:
    """The sink of ranks that log nothing."""

    def step(self, record: StepRecord) -> None:
        """Nothing."""

    def evaluation(self, step: int, record: EvaluationRecord) -> None:
        """Nothing."""

    def start(self, record: StartRecord) -> None:
        """Nothing."""

    def save(self, record: SaveRecord) -> None:
        """Nothing."""

    def event(self, step: int, text: str) -> None:
        """Nothing."""

    def warning(self, step: int, text: str) -> None:
        """Nothing."""

    def ending(self, step: int, text: str) -> None:
        """Nothing."""

    def close(self, state: State = "stopped") -> None:
        """Nothing."""


class LogSteps:
    """Sends every step to the sink, and has the run directory note every logged one.

    Losses are means over ranks in logged steps (every n-th and the last) and this rank's own in between: what only
    moves a progress line is not worth a collective.
    """

    doing = "logging"

    def __init__(
        self,
        sink: Sink,
        notes: ProgressNotes,
        world: World,
        device: torch.device,
        every: int,
        total_steps: int,
        utilisation: Utilisation,
        num_broken: Callable[[], int],
        interval: Interval,
    ) -> None:
        self._num_broken = num_broken
        self._sink, self._notes, self._world, self._device = sink, notes, world, device
        self._every, self._total, self._utilisation, self._interval = every, total_steps, utilisation, interval

    def after_step(self, report: StepReport) -> None:
        """Every rank takes part in the means."""
        logged = report.step % self._every == 0 or report.step == self._total
        num_broken, interval = None, None
        self._interval.add(report)
        if logged:
            own = {_BROKEN: float(self._num_broken()), **self._interval.own(report)}
            losses = mean_over_ranks({**report.result.losses, **own}, self._device)
            num_broken = round(losses.pop(_BROKEN) * self._world.num_ranks)
            interval = self._interval.record(losses, report)
        elif self._world.is_main:
            losses = report.result.host_losses
        if not self._world.is_main:
            return
        self._sink.step(self._record(report, losses, num_broken, interval))
        if logged:
            self._notes.note(report.step)

    def _record(
        self,
        report: StepReport,
        losses: Mapping[str, float],
        num_broken: int | None,
        interval: IntervalRecord | None,
    ) -> StepRecord:
        tflops = self._utilisation.tflops(report.result.sizes_px, report.seconds)
        return StepRecord(
            step=report.step,
            losses=losses,
            lr=report.lr,
            images=report.result.images * self._world.num_ranks,
            step_seconds=report.seconds,
            data_wait_seconds=report.wait_seconds,
            forward_seconds=report.result.forward_seconds,
            backward_seconds=report.result.backward_seconds,
            memory_bytes=None if interval is None else peak_memory_bytes(self._device),
            grad_norm=report.result.grad_norm,
            model_tflops=tflops,
            mfu=self._utilisation.mfu(tflops),
            broken_samples=num_broken,
            num_ranks=self._world.num_ranks,
            memory_now_bytes={} if interval is None else memory_now_bytes(self._device),
            interval=interval,
        )

    def at_stop(self, step: int) -> None:
        """Says so."""
        self._notes.finish()
        self._sink.ending(step, "stopped as asked")

    def at_end(self, step: int) -> None:
        """Says so."""
        self._notes.finish()
        self._sink.event(step, "training is done")


class LogStart:
    """Logs after the process's first step how long each phase up to there took, on this rank.

    Args:
        sink: Gets the record.
        clock: Knows the phases before the first step.
        first_save: What is known of a save, where the run has none yet.
    """

    doing = "logging"

    def __init__(self, sink: Sink, clock: StartClock, first_save: FirstSave | None = None) -> None:
        self._sink, self._clock, self._first_save = sink, clock, first_save
        self._logged = False

    def after_step(self, report: StepReport) -> None:
        """Logs once."""
        if self._logged:
            return
        self._logged = True
        first = {"first_batch": report.wait_seconds, "first_step": report.seconds - report.wait_seconds}
        foreseen_s = self._first_save.seconds if self._first_save else 0.0
        self._sink.start(StartRecord(report.step, self._clock.seconds | first, foreseen_s))
        if self._first_save:
            size_gib = self._first_save.num_bytes / GIB
            self._sink.event(report.step, f"a first save of {size_gib:.2f} GiB is expected to take {foreseen_s:.1f} s")

    def at_stop(self, step: int) -> None:
        """Nothing."""

    def at_end(self, step: int) -> None:
        """Nothing."""


class Average:
    """Has the average of the weights follow each step that moved them; comes before whoever uses it."""

    doing = "averaging weights"

    def __init__(self, average: WeightAverage) -> None:
        self._average = average

    def after_step(self, report: StepReport) -> None:
        """Follows, unless the step was not applied."""
        if report.result.applied:
            self._average.update()

    def at_stop(self, step: int) -> None:
        """Nothing is left to do."""

    def at_end(self, step: int) -> None:
        """Nothing is left to do."""


class Evaluate:
    """Runs an evaluation every so many steps and after the last; never where ``every`` is 0.

    Args:
        run: Evaluates; gives ``None`` where it was left because the run is asked to stop.
        sink: Gets what it finds.
        every: Steps between evaluations.
    """

    doing = "evaluating"

    def __init__(self, run: Callable[[], EvaluationRecord | None], sink: Sink, every: int) -> None:
        self._evaluate, self._sink, self._every = run, sink, every
        self._last = -1

    def after_step(self, report: StepReport) -> None:
        """Evaluates when due."""
        if self._every and report.step % self._every == 0:
            self._run(report.step)

    def at_stop(self, step: int) -> None:
        """Whoever stops a run does not want to wait for an evaluation."""

    def at_end(self, step: int) -> None:
        """Evaluates the final weights, unless the last step just did.

        Raises:
            Interrupted: The run was asked to stop meanwhile; the weights are saved.
        """
        if self._every and self._last != step and not self._run(step):
            raise Interrupted(
                f"stopped as asked in the last evaluation, after step {step}, which is saved",
                fix="evaluate with the same command and --resume",
            )

    def _run(self, step: int) -> bool:
        record = self._evaluate()
        if record is None:
            self._sink.event(step, "evaluation left: asked to stop")
            return False
        self._sink.evaluation(step, record)
        self._last = step
        return True


class Save:
    """Saves a checkpoint every so many steps, when stopped and at the end; only the last ones are waited for.

    Args:
        checkpointer: Saves.
        sink: Gets a record of each checkpoint.
        every: Steps between checkpoints.
        first_step: That of the checkpoint this process started from; 0 for none.
        note: Called with the step of each checkpoint once it is visible.
    """

    doing = "saving"

    def __init__(
        self,
        checkpointer: Checkpointer,
        sink: Sink,
        every: int,
        first_step: int,
        note: Callable[[int], None] = ignore_step,
    ) -> None:
        self._checkpointer, self._sink, self._every, self._note = checkpointer, sink, every, note
        self._last = first_step

    def after_step(self, report: StepReport) -> None:
        """Saves when due, and logs a save that has ended."""
        self._log(self._checkpointer.poll())
        if report.step % self._every == 0:
            self._save(report.step)

    def at_stop(self, step: int) -> None:
        """Saves what is not saved yet."""
        self._finish(step)

    def at_end(self, step: int) -> None:
        """Saves what is not saved yet."""
        self._finish(step)

    def _finish(self, step: int) -> None:
        self._save(step)
        self._log(self._checkpointer.finish())

    def _save(self, step: int) -> None:
        if step != self._last:
            self._log(self._checkpointer.save(step))
            self._last = step

    def _log(self, record: SaveRecord | None) -> None:
        if record is not None:
            self._sink.save(record)
            self._note(record.step)
