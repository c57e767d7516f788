"""What starting, saving and resuming cost by the number of ranks: messages, and operations on the disk they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from ranks import tiny_config
from sections.file_operations import count_operations
from tiny_task import TinyTask

from piip_scale.engine import save_job
from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.collective import count_collectives
from piip_scale.engine.ema import build_average
from piip_scale.engine.resuming import find_start
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.setup import build_engine, build_model
from piip_scale.run.run_dir import RunDirectory

PHASES = ("start", "save", "resume")


@dataclass
class Cost:
    """Of one rank in one phase; listings by which rank 0 waits for the others are left out, as many as time passes."""

    operations: Counter[str] = field(default_factory=Counter)
    collectives: int = 0

    @property
    def total(self) -> int:
        return sum(self.operations.values())


def costs(world, device, folder: Path, stage: int) -> dict[str, Cost]:
    """Every rank calls this; a run that starts, saves a step and resumes it as ``Session`` does."""
    run, found = RunDirectory(folder / f"stage{stage}_on_{world.num_ranks}"), {}
    config = tiny_config(zero={"stage": stage}, train={"steps": 2, "ema_decay": 0.9, "gradient_accumulation": 1})
    task = TinyTask(config, world, batches=2)

    def begin(start) -> tuple:
        engine, _ = build_engine(build_model(task, 0), config, world)
        checkpointer = Checkpointer(engine, run.checkpoints, config, world, 2)
        if start:
            start.resume(engine, checkpointer.describe(0))
        return engine, checkpointer, build_average(engine, config.train, checkpointer, start)

    with _counted(found, "start", run):
        engine, checkpointer, _ = begin(find_start(run))
    train_step(engine, iter([next(iter(task.train_batches(0, 0)))]), 0, 0, world)
    with _counted(found, "save", run), mock.patch.object(save_job, "_LOOK_SECONDS", 1e3 / 1e6):
        checkpointer.save(1)
        checkpointer._job._thread.join()
    checkpointer.finish()
    with _counted(found, "resume", run):
        begin(find_start(run))
    return found


@contextmanager
def _counted(found: dict[str, Cost], phase: str, run: RunDirectory) -> Iterator[None]:
    before = count_collectives()
    with count_operations(run.path) as operations:
        yield
    operations.pop("listdir", None)
    found[phase] = Cost(operations, count_collectives() - before)
