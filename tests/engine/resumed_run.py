"""A run from its start, or from a checkpoint of another, to its end; saved on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from piip_scale.config.run import RunConfig
from piip_scale.engine.batch_stream import BatchStream
from piip_scale.engine.batching import scale_to_ranks
from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.collective import mean_over_ranks
from piip_scale.engine.optim import set_learning_rate
from piip_scale.engine.resuming import find_checkpoint
from piip_scale.engine.schedule import lr_factor
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.setup import build_engine, build_model


def train_to_end(
    world, device, config: RunConfig, source: Path | None, saves: Mapping[int, Path], make_task: Callable
) -> tuple[list[dict], object]:
    """Every rank calls this; it trains from the newest checkpoint of ``source``, or from the start.

    Args:
        source: Folder of checkpoints.
        saves: Folders to save into, by step; one for the last step is among them.
        make_task: Takes the config for this number of ranks, the world, and as ``batches`` a rank's micro-batches.

    Returns:
        Of each step the losses and the gradient norm, as all ranks see them; and the engine.
    """
    found, steps = find_checkpoint(source) if source else None, config.train.steps
    config = scale_to_ranks(found.keep_batches(config, world.num_ranks) if found else config, world.num_ranks)
    task = make_task(config, world, batches=steps * config.train.gradient_accumulation)
    stream = BatchStream(task, config.train, device)
    # A resumed run draws other weights, so that those of the checkpoint have to come.
    engine, _ = build_engine(build_model(task, 1 if found else 0), config, world)
    savers = {step: Checkpointer(engine, folder, config, world, steps) for step, folder in saves.items()}
    first = found.resume(engine, savers[steps].describe(0)) if found else 0
    trace = []
    for step in range(first, steps):
        _save(savers, step)
        set_learning_rate(engine.optimizer.param_groups, config.optimizer.lr * lr_factor(config.schedule, step, steps))
        result = train_step(engine, stream.step(step), step, 0, world)
        trace.append(mean_over_ranks(result.losses, device) | {"norm": result.grad_norm})
    _save(savers, steps)
    return trace, engine


def _save(savers: Mapping[int, Checkpointer], step: int) -> None:
    if step in savers:
        savers[step].save(step)
        savers[step].finish()
