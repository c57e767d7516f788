"""Saving and resuming a training: DeepSpeed's sharded files, committed by the store, described by one JSON."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from piip_scale import __version__
from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.config.run import RunConfig
from piip_scale.engine.collective import on_main
from piip_scale.errors import CheckpointError
from piip_scale.files import disk_errors
from piip_scale.world import World

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

STATE_FILE = "training.json"
_ZERO_FOLDER = "zero"
_CLIENT_KEY = "piip_scale"
_NAMES_SHOWN = 3
_TORCH_WRITE_FAILURES = ("PytorchStreamWriter failed", "inline_container.cc")


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
    """Saves and restores one engine. Every method is collective.

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
        self._store = CheckpointStore(folder, config.train.keep_checkpoints)
        self._batches = num_train_batches
        self._shapes, self._groups = _describe(engine)

    def save(self, step: int) -> str:
        """Writes a checkpoint of the weights after ``step`` steps; returns its name.

        Raises:
            CheckpointError: The disk refuses; no part of the checkpoint is visible then.
        """
        on_main(lambda: self._store.begin(step))
        state = asdict(self._state(step))
        try:
            self._write(self._store.staging(step), state)
        except CheckpointError:
            # The run ends here; what the disk took of this save is room for the next.
            self._store.abandon(step)
            raise
        dist.barrier()
        return on_main(lambda: self._commit(step, state))

    def _write(self, staging: Path, state: dict[str, Any]) -> None:
        try:
            with disk_errors(CheckpointError, f"write checkpoint {staging} on rank {self._world.rank}"):
                self._engine.save_checkpoint(
                    str(staging), tag=_ZERO_FOLDER, client_state={_CLIENT_KEY: state}, save_latest=False
                )
        except RuntimeError as error:
            # torch.save reports a full disk as a failed write of its zip file, without an errno.
            if not any(sign in str(error) for sign in _TORCH_WRITE_FAILURES):
                raise
            raise CheckpointError(
                f"cannot write checkpoint {staging} on rank {self._world.rank}: the disk took only a part",
                fix="free some space on that disk, then continue with --resume",
            ) from error

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

    def _commit(self, step: int, state: dict[str, Any]) -> str:
        staging = self._store.staging(step)
        with disk_errors(CheckpointError, f"write checkpoint {staging}"):
            (staging / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        return self._store.commit(step).name

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
