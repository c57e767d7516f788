"""What each process of a training runs, however it was started: alone, by ``launch_local``, torchrun or srun."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import torch

from piip_scale.config.run import RunConfig
from piip_scale.engine.batching import batch_line, scale_to_ranks
from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.evaluation import evaluate
from piip_scale.engine.hooks import Evaluate, Save, Silence, Sink, Tell, TellStart
from piip_scale.engine.run_dir import RunDirectory, error_line
from piip_scale.engine.setup import build_engine, build_model, init_distributed
from piip_scale.engine.starting import StartClock
from piip_scale.engine.stop import StopFlag, unsaved
from piip_scale.engine.stream import BatchStream
from piip_scale.engine.trainer import Hook, Trainer
from piip_scale.errors import Interrupted, PiipError
from piip_scale.logging import configure_logging, get_logger
from piip_scale.tasks.base import Task
from piip_scale.telemetry.telemetry import Telemetry
from piip_scale.world import World, read_world

_ECHO_WAIT_S = 1.0

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
    ``errors/rank_N.txt`` of the run directory.

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
    try:
        _train(config, run, task_factory, world, stop, show_progress=show_progress)
    except Interrupted as error:
        if world.is_main:
            get_logger(__name__).warning(error.line)
        return error.exit_code
    except KeyboardInterrupt as error:
        return _fail(run, world, unsaved().with_traceback(error.__traceback__))
    except Exception as error:  # noqa: BLE001 - the last place where a rank can still speak
        return _fail(run, world, error)
    return 0


def _fail(run: RunDirectory, world: World, error: BaseException) -> int:
    if _has_lost_contact(error):
        # The rank at the other end, or the launcher if that was killed, knows more than this one.
        time.sleep(_ECHO_WAIT_S)
    if run.record_error(world.rank, error):
        line = error_line(error)
        where = "" if isinstance(error, PiipError) else f" (traceback: {run.errors / f'rank_{world.rank}.txt'})"
        get_logger(__name__).error("piip-scale: error: %s%s", line, where)
        # Where the disk is what failed, the status cannot be written either, and one line has been said.
        with suppress(PiipError):
            before = run.status()
            run.write_status("failed", before.step if before else 0, line)
    return error.exit_code if isinstance(error, PiipError) else 1


def _has_lost_contact(error: BaseException) -> bool:
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _train(
    config: RunConfig,
    run: RunDirectory,
    task_factory: TaskFactory,
    world: World,
    stop: StopFlag,
    *,
    show_progress: bool,
) -> None:
    get_logger(__name__).info(batch_line(config, world.num_ranks))
    config = scale_to_ranks(config, world.num_ranks)
    clock = StartClock()
    clock.end_phase("imports")
    device = init_distributed(world)
    clock.end_phase("join")
    task = task_factory(config, world)
    stream = BatchStream(task, config.train, device)
    model = build_model(task, config.train.seed)
    clock.end_phase("build")
    engine, _ = build_engine(model, config, world, clock)
    checkpointer = Checkpointer(engine, run.checkpoints, config, world, task.num_train_batches())
    first_step = checkpointer.resume()
    clock.end_phase("resume")
    sink = _open_sink(config, run, world, stream.total_steps, first_step, show_progress=show_progress)
    hooks: list[Hook] = [
        Tell(sink, run, world, device, config.train.log_every_steps, stream.total_steps),
        TellStart(sink, clock),
        Save(checkpointer, sink, config.train.checkpoint_every_steps, first_step),
        Evaluate(lambda: evaluate(engine, task, device), sink, config.train.evaluate_every_steps),
    ]
    trainer = Trainer(engine, stream, config, world, device, stop, hooks, first_step)
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
    config: RunConfig, run: RunDirectory, world: World, total_steps: int, first_step: int, *, show_progress: bool
) -> Sink:
    if not world.is_main:
        return Silence()
    sink = Telemetry(
        run.path,
        total_steps,
        first_step,
        show_progress=show_progress,
        log_every_steps=config.train.log_every_steps,
    )
    if first_step:
        sink.event(first_step, f"resumed after step {first_step}")
    return sink
