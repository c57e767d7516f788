"""Saving a training: DeepSpeed's sharded files, committed by the store, described by one JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from piip_scale.agreement import on_main
from piip_scale.checkpoint.origin import STATE_FILE
from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.config.run import RunConfig
from piip_scale.engine.batching import images_per_step
from piip_scale.engine.host_copy import HostCopies
from piip_scale.engine.save_job import LAST_SECONDS, Progress, SaveFiles, SaveJob
from piip_scale.engine.versions import STATE_FORMAT, versions
from piip_scale.engine.zero.deepspeed_api import Engine, real_shape
from piip_scale.engine.zero.engine_files import engine_files
from piip_scale.engine.zero.replicas import saves_slices, slices_rank
from piip_scale.errors import CheckpointError
from piip_scale.logging import get_logger
from piip_scale.models.frozen_files import NAMES, describe_left_out
from piip_scale.telemetry.records import SaveRecord
from piip_scale.world import World

ZERO_FOLDER = "zero"
_CLIENT_KEY = "piip_scale"
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint says of the training it belongs to, beside the tensors.

    The position in the data and the rates follow from the step, and every random number of every rank from the config's
    seed and the step (``seed_step``; the order and augmentation of ``data``), so there is no generator's state to keep.

    Attributes:
        step: Optimiser steps behind it.
        num_ranks: Ranks that wrote it.
        stage: ZeRO stage.
        precision: ``fp32`` or ``bf16``.
        images_per_step: Images of an optimiser step, over all ranks.
        steps_per_epoch: Optimiser steps of an epoch.
        shapes: Shape of every parameter by name.
        groups: Names of the trainable parameters, by optimiser group.
        versions: Of the libraries that wrote it.
        config: The resolved config.
        sets: What the task's ``data_id`` says; empty in checkpoints of older versions.
        left_out: Frozen parameters that are not in it, and the files that are (``models.frozen_files``).
        format: Of this description.
    """

    step: int
    num_ranks: int
    stage: int
    precision: str
    images_per_step: int
    steps_per_epoch: int
    shapes: dict[str, list[int]]
    groups: list[list[str]]
    versions: dict[str, str]
    config: dict[str, Any]
    sets: str = ""
    left_out: dict[str, Any] = field(default_factory=dict)
    format: int = STATE_FORMAT


class Checkpointer:
    """Saves one engine. Building it and every method but ``add_part``, ``describe`` and ``close`` is collective.

    A save copies to host memory and returns; ``poll`` after each step says when the checkpoint is visible.

    Args:
        engine: The engine.
        folder: Holds the checkpoints.
        config: The run.
        world: The ranks.
        steps_per_epoch: Optimiser steps of an epoch.
        sets: The task's ``data_id``.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        config: RunConfig,
        world: World,
        steps_per_epoch: int,
        sets: str = "",
    ) -> None:
        self._engine, self._config, self._world = engine, config, world
        self._store = CheckpointStore(folder, config.train.keep_checkpoints, config.train.milestone_every_steps)
        self._steps_per_epoch, self._sets = steps_per_epoch, sets
        self._shapes, self._groups = _describe(engine)
        self._left_out = {} if config.train.save_frozen else on_main(self._describe_left_out)
        self._parts: dict[str, Callable[[], object]] = {}
        self._copies = HostCopies()
        self._job: SaveJob | None = None
        self._stall_seconds = 0.0

    def add_part(self, name: str, state: Callable[[], object]) -> None:
        """Has checkpoints hold something of every rank beside the engine, as ``part_path`` finds it; of replicas once.

        Args:
            name: A word.
            state: Called at each save, on every rank; returns what ``torch.save`` can write. Its tensors are copied
                before ``save`` returns.
        """
        self._parts[name] = state

    def _describe_left_out(self) -> dict[str, Any]:
        trained = {name for group in self._groups for name in group}
        return describe_left_out(self._config.model, self._shapes.keys() - trained)

    def save(self, step: int) -> SaveRecord | None:
        """Copies the state after ``step`` steps and has it written, after an earlier save has ended.

        Returns:
            The earlier save, where it ended only now.

        Raises:
            CheckpointError: The disk refused the earlier save, on any rank; or this one at its start.
        """
        started = time.perf_counter()
        earlier = self.finish()
        on_main(lambda: self._store.begin(step))
        self._job = SaveJob(self._store, step, self._world, self._collect(step))
        if not self._config.train.background_saves:
            self._wait(self._job)
        self._stall_seconds = time.perf_counter() - started
        return earlier

    def poll(self) -> SaveRecord | None:
        """The save under way, if it has ended by now on all ranks.

        Raises:
            CheckpointError: The disk refused it on some rank, the same on every rank; no part of it is visible.
        """
        if self._job is None:
            return None
        progress = self._agree(self._job)
        if progress is Progress.WRITING:
            return None
        job, self._job = self._job, None
        if progress is Progress.FAILED:
            self._raise_failure(job)
        return self._record(job)

    def finish(self) -> SaveRecord | None:
        """As ``poll``, but waits for the end of the save."""
        if self._job is not None:
            self._wait(self._job)
        return self.poll()

    def close(self) -> None:
        """Gives a save that an error overtook a moment to end, and logs what became of it. Not collective.

        Also where this rank's own part has ended: a launcher ends the others as soon as this process has.
        """
        job, self._job = self._job, None
        if job is None:
            return
        if not job.wait_for_all(LAST_SECONDS):
            job.cancel()
            get_logger(__name__).warning("the checkpoint of step %d was still being written: it is lost", job.step)
        elif job.error:
            get_logger(__name__).warning("the checkpoint of step %d is lost: %s", job.step, job.error.line)

    def _collect(self, step: int) -> SaveFiles:
        """This rank's files of a checkpoint; copies, where training goes on meanwhile."""
        self._copies.start()
        frozen = self._copies.copy if self._config.train.background_saves else _unchanged
        staging, state = self._store.staging(step), asdict(self.describe(step))
        tensors = engine_files(
            self._engine, staging, ZERO_FOLDER, {_CLIENT_KEY: state}, frozen, self._left_out.get(NAMES, ())
        )
        for name, part in self._parts.items() if saves_slices(self._engine) else ():
            tensors[_part_name(name, slices_rank(self._engine))] = frozen(part())
        return SaveFiles(tensors, {STATE_FILE: json.dumps(state, indent=1)} if self._world.is_main else {})

    def _agree(self, job: SaveJob) -> Progress:
        progress = torch.tensor([job.progress], device=self._engine.device)
        dist.all_reduce(progress, dist.ReduceOp.MAX)
        return Progress(int(progress.item()))

    def _wait(self, job: SaveJob) -> None:
        # In small portions: a rank whose disk refused must not wait for one that waits for its files.
        while self._agree(job) is Progress.WRITING:
            job.wait(_LOOK_SECONDS)

    def _raise_failure(self, job: SaveJob) -> NoReturn:
        errors: list[CheckpointError | None] = [None] * self._world.num_ranks
        dist.all_gather_object(errors, job.error)
        job.cancel()
        job.wait(LAST_SECONDS)
        dist.barrier()
        if self._world.is_main:
            # The run ends here; what the disk took of this save is room for the next.
            self._store.abandon(job.step)
        raise next(error for error in errors if error)

    def _record(self, job: SaveJob) -> SaveRecord:
        return SaveRecord(job.step, self._store.path(job.step).name, self._stall_seconds, job.seconds, job.num_bytes)

    def describe(self, step: int) -> TrainingState:
        """What a checkpoint after ``step`` steps says of this training."""
        return TrainingState(
            step=step,
            num_ranks=self._world.num_ranks,
            stage=self._config.zero.stage,
            precision=self._config.train.precision,
            images_per_step=images_per_step(self._config, self._world.num_ranks),
            steps_per_epoch=self._steps_per_epoch,
            shapes=self._shapes,
            groups=self._groups,
            versions=versions(),
            config=self._config.model_dump(mode="json"),
            sets=self._sets,
            left_out=self._left_out,
        )


def part_path(checkpoint: Path, name: str, rank: int) -> Path:
    """Where a rank's state of a part is that ``Checkpointer.add_part`` added, for ``torch.load``."""
    return checkpoint / _part_name(name, rank)


def _part_name(name: str, rank: int) -> str:
    return f"{name}/rank_{rank:05d}.pt"


def _unchanged(value: object) -> Any:
    return value


def _describe(engine: Engine) -> tuple[dict[str, list[int]], list[list[str]]]:
    parameters = dict(engine.module.named_parameters())
    shapes = {name: list(real_shape(p)) for name, p in parameters.items()}
    return shapes, [list(group["parameter_names"]) for group in engine.optimizer.param_groups]
