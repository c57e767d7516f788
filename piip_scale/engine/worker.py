"""What each process of a training runs, however it was started: alone, by ``launch_local``, torchrun or srun."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta

import torch

from piip_scale.config.run import RunConfig
from piip_scale.engine.batching import batch_line, scale_to_ranks
from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.collective import any_rank
from piip_scale.engine.ema import build_average
from piip_scale.engine.evaluation import evaluate
from piip_scale.engine.failing import tell_failure
from piip_scale.engine.heartbeat import Heartbeat
from piip_scale.engine.hooks import Average, Evaluate, Save, Silence, Sink, Tell, TellStart
from piip_scale.engine.out_of_memory import device_memory_error, is_out_of_memory
from piip_scale.engine.resuming import Checkpoint, find_checkpoint
from piip_scale.engine.run_dir import RunDirectory
from piip_scale.engine.setup import build_engine, build_model, init_distributed, set_group_timeouts
from piip_scale.engine.starting import StartClock
from piip_scale.engine.stop import StopFlag, unsaved
from piip_scale.engine.stream import BatchStream
from piip_scale.engine.trainer import Hook, Trainer
from piip_scale.engine.utilisation import Utilisation, peak_tflops
from piip_scale.engine.watchdog import Watchdog
from piip_scale.errors import Interrupted, PiipError
from piip_scale.logging import configure_logging, get_logger
from piip_scale.tasks.base import Task
from piip_scale.telemetry.telemetry import Telemetry
from piip_scale.world import World, read_world

_ECHO_WAIT_S = 1.0
_MINUTE_S = 60.0
# The communication library's own limit knows neither ranks nor stacks, so it comes later than the watchdog's.
_GROUP_MARGIN = timedelta(minutes=10)

TaskFactory = Callable[[RunConfig, World], Task]


def train_worker(
    config: RunConfig,
    config_text: str,
    run: RunDirectory,
    task_factory: TaskFactory,
    *,
    resume: bool = False,
    show_progress: bool = True,
) -> int:
    """Trains as one rank of the world that the environment describes. Collective.

    An error is told by the first rank that meets it, in one line on standard error, and written with its traceback to
    ``errors/rank_N.txt`` of the run directory; a watchdog ends ranks that hang, or outlive another's error.

    Args:
        config: The run.
        config_text: The resolved config as the run directory keeps it.
        run: The run's directory; rank 0 opens it.
        task_factory: Makes the task.
        resume: Continue the run that is there.
        show_progress: Draw a progress line on the main rank.

    Returns:
        The process's exit code: 0 when done, the error's own otherwise. Leave the process at once with it.

    Raises:
        PiipError: The world does not add up, or the directory cannot be opened; nothing has started then.
    """
    world = read_world()
    configure_logging(world.rank)
    if world.is_main:
        run.open(config_text, resume=resume)
        before = run.status()
        run.write_status("running", before.step if before else 0)
    stop = StopFlag()
    stop.install()
    heartbeat = Heartbeat(config.train.hang_minutes * _MINUTE_S, config.train.slow_hang_minutes * _MINUTE_S)
    with Watchdog(run, world, heartbeat):
        try:
            _train(config, run, task_factory, world, stop, heartbeat, show_progress=show_progress)
        except Interrupted as error:
            if world.is_main:
                get_logger(__name__).warning(error.line)
            return error.exit_code
        except KeyboardInterrupt as error:
            return tell_failure(run, world.rank, unsaved().with_traceback(error.__traceback__))
        except Exception as error:  # noqa: BLE001 - the last place where a rank can still speak
            if _is_echo(error):
                time.sleep(_ECHO_WAIT_S)
            return tell_failure(run, world.rank, error)
    return 0


def _is_echo(error: BaseException) -> bool:
    """Whether the rank at the other end, or the launcher if that was killed, knows more than this one."""
    lost_contact = isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
    return lost_contact or (isinstance(error, PiipError) and error.is_echo)


def _train(
    config: RunConfig,
    run: RunDirectory,
    task_factory: TaskFactory,
    world: World,
    stop: StopFlag,
    heartbeat: Heartbeat,
    *,
    show_progress: bool,
) -> None:
    clock = StartClock()
    clock.end_phase("imports")
    device = init_distributed(world)
    clock.end_phase("join")
    found = find_checkpoint(run.checkpoints)
    if found:
        config = found.keep_batches(config, world.num_ranks)
    get_logger(__name__).info(batch_line(config, world.num_ranks))
    scaled = scale_to_ranks(config, world.num_ranks)
    task = task_factory(scaled, world)
    try:
        _train_task(task, scaled, run, found, world, device, stop, heartbeat, clock, show_progress=show_progress)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise device_memory_error(task, config, world, device) from error


def _train_task(
    task: Task,
    config: RunConfig,
    run: RunDirectory,
    found: Checkpoint | None,
    world: World,
    device: torch.device,
    stop: StopFlag,
    heartbeat: Heartbeat,
    clock: StartClock,
    *,
    show_progress: bool,
) -> None:
    stream = BatchStream(task, config.train, device)
    model = build_model(task, config.train.seed)
    clock.end_phase("build")
    engine, _ = build_engine(model, config, world, clock)
    set_group_timeouts(timedelta(minutes=config.train.slow_hang_minutes) + _GROUP_MARGIN)
    checkpointer = Checkpointer(engine, run.checkpoints, config, world, stream.steps_per_epoch)
    first_step = found.resume(engine, checkpointer.describe(0)) if found else 0
    average = build_average(engine, config.train, checkpointer, found)
    clock.end_phase("resume")
    sink = _open_sink(config, run, world, stream.total_steps, found, show_progress=show_progress)

    def goes_on() -> bool:
        heartbeat.again()
        return not any_rank(bool(stop), device)

    def measure() -> dict[str, float] | None:
        with average.in_place() if average else nullcontext():
            return evaluate(engine, task, device, goes_on)

    utilisation = Utilisation(config.model, peak_tflops(device, config.train.precision))
    hooks: list[Hook] = [
        *([Average(average)] if average else []),
        Tell(sink, run, world, device, config.train.log_every_steps, stream.total_steps, utilisation),
        TellStart(sink, clock),
        Save(checkpointer, sink, config.train.checkpoint_every_steps, first_step),
        Evaluate(measure, sink, config.train.evaluate_every_steps),
    ]
    trainer = Trainer(engine, stream, config, world, device, stop, hooks, heartbeat, first_step)
    try:
        _run(trainer, checkpointer, sink, run, world)
    except Interrupted:
        # Together: once one rank is gone, srun and launch_local end those that are still writing.
        torch.distributed.barrier()
        raise
    torch.distributed.destroy_process_group()


def _run(trainer: Trainer, checkpointer: Checkpointer, sink: Sink, run: RunDirectory, world: World) -> None:
    try:
        trainer.run()
    except Interrupted as error:
        if world.is_main:
            run.write_status("stopped", trainer.step, error.line)
        raise
    except Exception:
        checkpointer.close()
        raise
    finally:
        sink.close()
    if world.is_main:
        run.write_status("done", trainer.step)


def _open_sink(
    config: RunConfig,
    run: RunDirectory,
    world: World,
    total_steps: int,
    found: Checkpoint | None,
    *,
    show_progress: bool,
) -> Sink:
    if not world.is_main:
        return Silence()
    first_step = found.state.step if found else 0
    sink = Telemetry(
        run.path,
        total_steps,
        first_step,
        show_progress=show_progress,
        log_every_steps=config.train.log_every_steps,
    )
    if found:
        ranks = f"ranks before: {found.state.num_ranks}, now: {world.num_ranks}"
        sink.event(first_step, f"resumed after step {first_step} ({ranks})")
    return sink
