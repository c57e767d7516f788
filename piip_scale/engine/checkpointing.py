"""Saving and resuming a training: DeepSpeed's sharded files, committed by the store, described by one JSON."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from piip_scale import __version__
from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.config.run import RunConfig
from piip_scale.engine.collective import on_main
from piip_scale.engine.engine_files import engine_files
from piip_scale.engine.host_copy import HostCopies
from piip_scale.engine.save_job import Progress, SaveFiles, SaveJob
from piip_scale.errors import CheckpointError
from piip_scale.logging import get_logger
from piip_scale.telemetry.records import SaveRecord
from piip_scale.world import World

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

STATE_FILE = "training.json"
_ZERO_FOLDER = "zero"
_CLIENT_KEY = "piip_scale"
_NAMES_SHOWN = 3
# What an error leaves of a run may take so long to end; srun and launch_local kill it soon after.
_LAST_SECONDS = 5.0
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint says of the training it belongs to, beside the tensors.

    The position in the data, the rates and every random number follow from the step, so there is nothing else to keep.

    Attributes:
        step: Optimiser steps behind it.
        num_ranks: Ranks that wrote it.
        stage: ZeRO stage.
        precision: ``fp32`` or ``bf16``.
        num_train_batches: Micro-batches of an epoch on each rank.
        shapes: Shape of every parameter by name.
        groups: Names of the trainable parameters, by optimiser group.
        versions: Of the libraries that wrote it.
        config: The resolved config.
    """

    step: int
    num_ranks: int
    stage: int
    precision: str
    num_train_batches: int
    shapes: dict[str, list[int]]
    groups: list[list[str]]
    versions: dict[str, str]
    config: dict[str, Any]


class Checkpointer:
    """Saves and restores one engine. Every method but ``add_part`` and ``close`` is collective.

    A save copies to host memory and returns; ``poll`` after each step tells when the checkpoint is visible.

    Args:
        engine: The engine.
        folder: Holds the checkpoints.
        config: The run.
        world: The ranks.
        num_train_batches: Micro-batches of an epoch on each rank.
    """

    def __init__(
        self, engine: DeepSpeedEngine, folder: Path, config: RunConfig, world: World, num_train_batches: int
    ) -> None:
        self._engine, self._config, self._world = engine, config, world
        self._store = CheckpointStore(folder, config.train.keep_checkpoints, config.train.milestone_every_steps)
        self._batches = num_train_batches
        self._shapes, self._groups = _describe(engine)
        self._parts: dict[str, Callable[[], object]] = {}
        self._copies = HostCopies()
        self._job: SaveJob | None = None
        self._stall_seconds = 0.0

    def add_part(self, name: str, state: Callable[[], object]) -> None:
        """Has every rank's checkpoints hold something beside the engine, as ``part_path`` finds it.

        Args:
            name: A word.
            state: Called at each save, on every rank; returns what ``torch.save`` can write. Its tensors are copied
                before ``save`` returns.
        """
        self._parts[name] = state

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
        """Gives a save that an error overtook a moment to end, and tells what became of it. Not collective."""
        job, self._job = self._job, None
        if job is None:
            return
        if not job.wait(_LAST_SECONDS):
            job.cancel()
            get_logger(__name__).warning("the checkpoint of step %d was still being written: it is lost", job.step)
        elif job.error:
            get_logger(__name__).warning("the checkpoint of step %d is lost: %s", job.step, job.error.line)

    def _collect(self, step: int) -> SaveFiles:
        """This rank's files of a checkpoint; copies, where training goes on meanwhile."""
        self._copies.start()
        frozen = self._copies.copy if self._config.train.background_saves else _unchanged
        staging, state = self._store.staging(step), asdict(self._state(step))
        tensors = engine_files(self._engine, staging, _ZERO_FOLDER, {_CLIENT_KEY: state}, frozen)
        for name, part in self._parts.items():
            tensors[_part_name(name, self._world.rank)] = frozen(part())
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
        job.wait(_LAST_SECONDS)
        dist.barrier()
        if self._world.is_main:
            # The run ends here; what the disk took of this save is room for the next.
            self._store.abandon(job.step)
        raise next(error for error in errors if error)

    def _record(self, job: SaveJob) -> SaveRecord:
        return SaveRecord(job.step, self._store.path(job.step).name, self._stall_seconds, job.seconds, job.num_bytes)

    def resume(self) -> int:
        """Restores the newest valid checkpoint; returns its step, 0 where there is none.

        Raises:
            CheckpointError: It belongs to another model, optimiser or number of ranks.
        """
        newest = on_main(self._newest)
        if newest is None:
            return 0
        state = read_state(newest)
        self._check(newest, state)
        loaded, _ = self._engine.load_checkpoint(str(newest), tag=_ZERO_FOLDER)
        if loaded is None:
            raise CheckpointError(f"DeepSpeed could not load {newest}", fix="take an older checkpoint")
        return state.step

    def _newest(self) -> Path | None:
        self._store.clean()
        newest = self._store.latest()
        if newest is not None:
            self._store.validate(newest)
        return newest

    def _state(self, step: int) -> TrainingState:
        return TrainingState(
            step=step,
            num_ranks=self._world.num_ranks,
            stage=self._config.zero.stage,
            precision=self._config.train.precision,
            num_train_batches=self._batches,
            shapes=self._shapes,
            groups=self._groups,
            versions={name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
            | {"piip-scale": __version__},
            config=self._config.model_dump(mode="json"),
        )

    def _check(self, path: Path, saved: TrainingState) -> None:
        """Refuses what would load into the wrong place: DeepSpeed's flat buffers carry no names."""
        now = self._state(saved.step)
        _check_shapes(path, saved.shapes, now.shapes)
        for field, meaning in (
            ("num_ranks", "ranks"),
            ("stage", "zero.stage"),
            ("precision", "train.precision"),
            ("num_train_batches", "batches of an epoch on each rank (data, micro_batch_size)"),
        ):
            before, here = getattr(saved, field), getattr(now, field)
            if before != here:
                raise CheckpointError(
                    f"checkpoint {path} was written with {meaning} {before!r}, this run has {here!r}",
                    rule="a run resumes as it was",
                    fix=f"start it with {before!r} again, or convert it and start a new run from its weights",
                )
        if saved.groups != now.groups:
            raise CheckpointError(
                f"checkpoint {path} has other optimiser groups ({len(saved.groups)} against {len(now.groups)})",
                rule="weight_decay and layer_decay decide which parameters share one",
                fix="set optimizer.layer_decay and optimizer.weight_decay as they were",
            )


def read_state(checkpoint: Path) -> TrainingState:
    """What a checkpoint says of its training.

    Raises:
        CheckpointError: The description is missing or of another version.
    """
    path = checkpoint / STATE_FILE
    try:
        return TrainingState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}",
            rule="this version of piip-scale writes one into every checkpoint",
            fix="resume with the version that wrote it, or convert its weights",
        ) from error


def part_path(checkpoint: Path, name: str, rank: int) -> Path:
    """Where a rank's state of a part is that ``Checkpointer.add_part`` added, for ``torch.load``."""
    return checkpoint / _part_name(name, rank)


def _part_name(name: str, rank: int) -> str:
    return f"{name}/rank_{rank:05d}.pt"


def _unchanged(value: object) -> Any:
    return value


def _describe(engine: DeepSpeedEngine) -> tuple[dict[str, list[int]], list[list[str]]]:
    parameters = dict(engine.module.named_parameters())
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    return shapes, [list(group["parameter_names"]) for group in engine.optimizer.param_groups]


def _check_shapes(path: Path, saved: dict[str, list[int]], now: dict[str, list[int]]) -> None:
    differing = sorted(name for name in saved.keys() & now.keys() if saved[name] != now[name])
    problems = [
        _named("only in the checkpoint", sorted(saved.keys() - now.keys())),
        _named("only in this model", sorted(now.keys() - saved.keys())),
        _named("of another shape", [f"{name} {saved[name]} against {now[name]}" for name in differing]),
    ]
    if any(problems):
        raise CheckpointError(
            f"checkpoint {path} is of another model: {'; '.join(problem for problem in problems if problem)}",
            fix="resume with the config of its run directory",
        )


def _named(what: str, names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return ""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_NAMES_SHOWN])}{more})"
