"""One rank's training between joining the others and leaving them: everything it needs, put together once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch

from piip_scale.agreement import gathered
from piip_scale.config.loading import config_text
from piip_scale.config.run import RunConfig, TrainConfig
from piip_scale.config.zero import ZeroConfig
from piip_scale.engine.bad_steps import KeepBadSteps
from piip_scale.engine.batch_stream import BatchStream
from piip_scale.engine.batching import batch_line, scale_to_ranks, shrunk_line
from piip_scale.engine.branch_watch import BranchWatch
from piip_scale.engine.checkpoint_choice import settle_checkpointing
from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.collective import any_rank, require_same
from piip_scale.engine.ema import build_average
from piip_scale.engine.evaluation import evaluate
from piip_scale.engine.first_save import FirstSave, foresee_first_save
from piip_scale.engine.hooks import Average, Evaluate, LogStart, LogSteps, Save, Silence, Sink, ignore_step
from piip_scale.engine.interval import Interval
from piip_scale.engine.kernel_choice import choose_kernels
from piip_scale.engine.layout_choice import settle_layout
from piip_scale.engine.out_of_memory import device_memory_error, is_out_of_memory
from piip_scale.engine.profiling import BeginProfile, EndProfile, Profiling
from piip_scale.engine.resuming import Checkpoint, find_start
from piip_scale.engine.stop import StopFlag
from piip_scale.engine.trainer import Hook, Trainer
from piip_scale.engine.utilisation import Utilisation, peak_tflops
from piip_scale.engine.zero.deepspeed_api import Engine, set_group_timeouts
from piip_scale.engine.zero.replicas import check_replicas
from piip_scale.engine.zero.setup import (
    Give,
    build_engine,
    build_model,
    give_blanks,
    give_weights,
    init_distributed,
)
from piip_scale.errors import Interrupted, RunError
from piip_scale.logging import get_logger
from piip_scale.run.bad_steps import config_sha256
from piip_scale.run.ending import Ending, ending_of, error_line
from piip_scale.run.environment import command_text, few_cores_line
from piip_scale.run.gpu_time import GpuTimeFile
from piip_scale.run.heartbeat import Heartbeat
from piip_scale.run.profiled_steps import ProfiledSteps
from piip_scale.run.progress_notes import ProgressNotes
from piip_scale.run.run_dir import RunDirectory, State
from piip_scale.run.starting import StartClock
from piip_scale.tasks.base import Task
from piip_scale.telemetry.records import EvaluationRecord
from piip_scale.telemetry.telemetry import Telemetry
from piip_scale.telemetry.trackers import TrackedRun
from piip_scale.world import World, node_name, usable_cores

# The communication library's own limit knows neither ranks nor stacks, so it comes later than the watchdog's.
_GROUP_MARGIN = timedelta(minutes=10)

TaskFactory = Callable[[RunConfig, World], Task]


@dataclass(frozen=True)
class Session:
    """What one rank trains with. Every method is collective.

    Attributes:
        config: The run, as written.
        run: Its directory.
        world: The ranks.
        stop: The flag that signals set.
        heartbeat: Reports this rank's progress to the watchdog.
        show_progress: Draw a progress line on the main rank.
        earlier: How the attempt before this one ended, where it failed; of the main rank.
        profiled: Steps of this attempt that the main rank profiles.
        gpu_time: What the run's attempts take; of the main rank.
        settings: Keys that were changed from the recipe, with their values.
    """

    config: RunConfig
    run: RunDirectory
    world: World
    stop: StopFlag
    heartbeat: Heartbeat
    show_progress: bool
    earlier: Ending | None = None
    profiled: ProfiledSteps | None = None
    gpu_time: GpuTimeFile | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def train(self, task_factory: TaskFactory) -> None:
        """Joins the ranks, resumes what is there, trains to the end, and leaves.

        Raises:
            Interrupted: The run was asked to stop; all is saved.
            PiipError: The run cannot go on.
        """
        clock = StartClock()
        clock.end_phase("imports")
        device = init_distributed(self.world, group_timeout(self.config.train))
        clock.end_phase("join")
        _warn_of_few_cores(self.world, device)
        found = find_start(self.run)
        config = found.keep_batches(self.config, self.world.num_ranks) if found else self.config
        for line_of in (shrunk_line, batch_line):
            if line := line_of(config, self.world.num_ranks):
                get_logger(__name__).info(line)
        scaled = scale_to_ranks(config, self.world.num_ranks)
        task = task_factory(scaled, self.world)
        # Nodes that have a copy each may have different ones, and samples would be lost and repeated without a word.
        require_same("the shards", task.data_id(), "give every node the same sets, then start again")
        laid_out = settle_layout(scaled, task, self.world, device)
        settled = settle_checkpointing(laid_out, task, self.world, device, found)
        if settled is not scaled:
            scaled, task = settled, task_factory(settled, self.world)
        for line in choose_kernels(scaled, device):
            get_logger(__name__).info(line)
        try:
            _Training(self._with_layout(scaled.zero), task, scaled, device, found, clock).run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            laid_out = config.model_copy(update={"zero": scaled.zero})
            raise device_memory_error(task, laid_out, self.world, device) from error

    def _with_layout(self, decided: ZeroConfig) -> Session:
        """The session whose run's config says what was decided."""
        if not self.config.zero.open_keys:
            return self
        config = self.config.model_copy(update={"zero": self.config.zero.decided(decided)})
        if self.world.is_main:
            self.run.decide(config_text(config))
        return replace(self, config=config)


def group_timeout(train: TrainConfig) -> timedelta:
    """How long the communication library lets a collective wait: longer than the longest limit the run promises.

    So the watchdog ends a run that hangs, from the first message among ranks on.
    """
    return timedelta(minutes=train.slow_hang_minutes) + _GROUP_MARGIN


def _warn_of_few_cores(world: World, device: torch.device) -> None:
    """One line a run, also where only some ranks are bound so. Collective."""
    line = few_cores_line(usable_cores(), os.cpu_count() or 1)
    if any_rank(bool(line), device) and world.is_main:
        get_logger(__name__).warning(line or few_cores_line(1, os.cpu_count() or 2))


class _Training:
    """The engine with all that runs beside it, from the checkpoint it starts at."""

    def __init__(
        self,
        session: Session,
        task: Task,
        config: RunConfig,
        device: torch.device,
        found: Checkpoint | None,
        clock: StartClock,
    ) -> None:
        self._session, self._task, self._config, self._device = session, task, config, device
        stream = BatchStream(task, config.train, device)
        self._engine = self._build_engine(clock, give_blanks if found else give_weights)
        self._checkpointer = Checkpointer(
            self._engine, session.run.checkpoints, config, session.world, stream.steps_per_epoch, task.data_id()
        )
        first_step = found.resume(self._engine, self._checkpointer.describe(0)) if found else 0
        check_replicas(self._engine)
        self._average = build_average(self._engine, config.train, self._checkpointer, found)
        clock.end_phase("resume")
        # Later saves have been measured, and those are what a job goes by.
        self._first_save = None if found else self._foresee_save()
        clock.end_phase("disk")
        self._sink = self._open_sink(stream.total_steps, found)
        self._trainer = Trainer(
            self._engine,
            stream,
            config,
            session.world,
            device,
            session.stop,
            self._hooks(stream, first_step, clock),
            session.heartbeat,
            first_step,
        )

    def _foresee_save(self) -> FirstSave:
        session, averaged = self._session, self._average is not None
        folder, stage = session.run.checkpoints, self._config.zero.stage
        return foresee_first_save(self._engine, folder, stage, averaged=averaged)

    def run(self) -> None:
        try:
            self._run()
        except Interrupted:
            # Together: once one rank is gone, srun and launch_local end those that are still writing.
            torch.distributed.barrier()
            raise
        torch.distributed.destroy_process_group()

    def _run(self) -> None:
        run, is_main = self._session.run, self._session.world.is_main
        state: State = "failed"
        try:
            self._trainer.run()
            state = "done"
        except Interrupted as error:
            state = "stopped"
            if is_main:
                run.write_status("stopped", self._trainer.step, ending_of(error, step=self._trainer.step))
            raise
        except Exception as error:
            # A disk that is full has been the error already.
            with suppress(RunError):
                self._sink.ending(self._trainer.step, f"failed: {error_line(error)}")
            self._checkpointer.close()
            raise
        finally:
            self._sink.close(state)
        if is_main:
            run.write_status("done", self._trainer.step)

    def _build_engine(self, clock: StartClock, give: Give) -> Engine:
        train = self._config.train
        model = build_model(self._task, train.seed)
        clock.end_phase("build")
        engine, _ = build_engine(model, self._config, self._session.world, clock, give)
        set_group_timeouts(group_timeout(train))
        return engine

    def _hooks(self, stream: BatchStream, first_step: int, clock: StartClock) -> list[Hook]:
        session, train = self._session, self._config.train
        use = Utilisation(self._task.network_flops, peak_tflops(self._device, train.precision))
        get_logger(__name__).info(use.line)
        note = session.run.note_checkpoint if session.world.is_main else ignore_step
        digest = config_sha256(session.run) if session.world.is_main else ""
        averaging: list[Hook] = [Average(self._average)] if self._average else []
        ends, begins = self._profile_hooks(first_step, stream.total_steps)
        return [
            *ends,
            *averaging,
            LogSteps(
                self._sink,
                ProgressNotes(session.run, session.gpu_time),
                session.world,
                self._device,
                train.log_every_steps,
                stream.total_steps,
                use,
                self._task.num_broken_samples,
                self._interval(),
            ),
            KeepBadSteps(self._sink, session.run, stream, digest),
            LogStart(self._sink, clock, self._first_save),
            Save(self._checkpointer, self._sink, train.checkpoint_every_steps, first_step, note),
            Evaluate(self._evaluate, self._sink, train.evaluate_every_steps),
            *begins,
        ]

    def _interval(self) -> Interval:
        session, model = self._session, self._engine.module
        useful_s = self._sink.useful_gpu_seconds() if isinstance(self._sink, Telemetry) else 0.0
        return Interval(
            session.world,
            self._device,
            gathered(node_name()),
            self._config.optimizer.clip_grad_norm,
            BranchWatch(self._engine, model.parts()),
            session.gpu_time,
            useful_s,
        )

    def _profile_hooks(self, first_step: int, total_steps: int) -> tuple[list[Hook], list[Hook]]:
        """Those before and after all others; of the main rank alone, since they exchange nothing."""
        session, train = self._session, self._config.train
        if session.profiled is None or not session.world.is_main:
            return [], []
        everies = (train.evaluate_every_steps, train.checkpoint_every_steps)
        profiling = Profiling(
            self._engine.module,
            self._device,
            session.run,
            self._sink,
            session.profiled,
            first_step,
            everies,
            total_steps,
        )
        return [EndProfile(profiling)], [BeginProfile(profiling)]

    def _evaluate(self) -> EvaluationRecord | None:
        with self._average.in_place() if self._average else nullcontext():
            return evaluate(self._engine, self._task, self._device, self._goes_on)

    def _goes_on(self) -> bool:
        self._session.heartbeat.again()
        return not any_rank(bool(self._session.stop), self._device)

    def _open_sink(self, total_steps: int, found: Checkpoint | None) -> Sink:
        session = self._session
        if not session.world.is_main:
            return Silence()
        first_step = found.state.step if found else 0
        sink = Telemetry(
            session.run.path,
            total_steps,
            first_step,
            show_progress=session.show_progress,
            log_every_steps=self._config.train.log_every_steps,
        )
        texts = {"config": config_text(session.config), "command": command_text()}
        sink.describe(first_step, texts, session.settings)
        tracked = self._config.telemetry
        sink.track(tracked.trackers, TrackedRun(session.run.path, tracked.project, session.settings, texts))
        if found:
            ranks = f"ranks before: {found.state.num_ranks}, now: {session.world.num_ranks}"
            ending = f"; before, at step {earlier.step}: {earlier.line}" if (earlier := session.earlier) else ""
            sink.event(first_step, f"resumed after step {first_step} ({ranks}){ending}")
        return sink
