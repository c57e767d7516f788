"""Going on from the newest checkpoint of a run, on the ranks there are now."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from piip_scale.agreement import LocalFault, is_distributed, on_main
from piip_scale.checkpoint.origin import STATE_FILE
from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.config.loading import check_config
from piip_scale.config.run import RunConfig
from piip_scale.engine.batching import keep_images_per_step, keep_streams
from piip_scale.engine.checkpointing import TrainingState
from piip_scale.engine.versions import FROM_WEIGHTS, check_format, warn_of_other_versions
from piip_scale.engine.zero.deepspeed_api import Engine
from piip_scale.engine.zero.restoring import restore
from piip_scale.errors import CheckpointError
from piip_scale.files import disk_errors
from piip_scale.logging import get_logger
from piip_scale.models.frozen_files import reader_of
from piip_scale.run.checkpoint_signs import sign_of_checkpoints
from piip_scale.run.run_dir import RunDirectory

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        path: Its folder.
        state: What it says of its training.
    """

    path: Path
    state: TrainingState

    def kept(self, config: RunConfig, num_ranks: int) -> RunConfig:
        """The config with steps of as many images, and the order, that the run has had so far.

        Raises:
            ConfigError: See ``keep_images_per_step``.
        """
        state = self.state
        return keep_streams(keep_images_per_step(config, state.images_per_step, num_ranks), _num_streams(state))

    def keep_batches(self, config: RunConfig, num_ranks: int) -> RunConfig:
        """The config with steps of as many images as the run's had, on these ranks; warns of what that changes.

        Raises:
            ConfigError: See ``keep_images_per_step``.
        """
        images, resumed = self.state.images_per_step, self.kept(config, num_ranks)
        if resumed.train is not config.train:
            get_logger(__name__).warning(
                "a step keeps its %d images: micro-batches of %d, accumulated as %d ranks need",
                images,
                resumed.data.micro_batch_size,
                num_ranks,
            )
        return resumed

    def resume(self, engine: Engine, now: TrainingState) -> int:
        """Puts it into an engine on whichever ranks and ZeRO stage; returns its step. Collective.

        Args:
            engine: The engine.
            now: What a checkpoint of this training would say.

        Raises:
            CheckpointError: It belongs to another model, optimiser, precision or order of the data, or is damaged.
            ModelError: It leaves frozen weights to a file that is not there any more, or another one now.
        """
        _check(self.path, self.state, now)
        if dist.get_rank() == 0:
            warn_of_other_versions(self.path, self.state.versions)
            warn_of_other_sets(self.path, self.state.sets, now.sets)
        given = reader_of(check_config(now.config).model) if self.state.left_out else None
        restore(engine, self.path, given)
        engine.global_steps = self.state.step
        engine.global_samples = self.state.step * self.state.images_per_step
        return self.state.step


def find_start(run: RunDirectory) -> Checkpoint | None:
    """Where a run goes on; ``None`` where it begins, having written no checkpoint yet. Collective.

    Raises:
        CheckpointError: It had checkpoints and none of them is whole, or its folder cannot take new ones; or as
            ``find_checkpoint``.
    """
    found = find_checkpoint(run.checkpoints)
    on_main(lambda: _prepare(run, found))
    return found


def _prepare(run: RunDirectory, found: Checkpoint | None) -> None:
    if found is None:
        refuse_lost_checkpoints(run)
    else:
        run.note_checkpoint(found.state.step)
    # Only now: it makes the folder, where a lost one must not seem to be there.
    CheckpointStore(run.checkpoints, keep=1).check_writable()


def refuse_lost_checkpoints(run: RunDirectory) -> None:
    """Refuses to begin a run at step 1 that has had checkpoints; called where none of them is whole.

    Raises:
        CheckpointError: It has had some.
        RunError: Its status cannot be read.
    """
    with disk_errors(CheckpointError, f"read {run.path}"):
        sign = sign_of_checkpoints(run)
    if sign:
        raise CheckpointError(
            f"run {run.path} has written checkpoints and none of them is whole here: {sign}",
            rule="a run that lost its checkpoints does not begin again by itself",
            fix="put them back (mount the disk, mend the link), or start over with --restart in the place of "
            "--resume, which sets this run aside",
        )
    if run.status():
        get_logger(__name__).info("no checkpoint of this run was written yet: it begins at step 1")


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest valid checkpoint, the same on every rank; removes what killed saves left. Collective.

    Args:
        folder: The run's checkpoints.

    Raises:
        CheckpointError: The newest one was changed after it was saved, or is of another version.
    """
    path, files = on_main(lambda: _newest(folder))
    if path is None:
        return None
    # Each rank a share: checksums of hundreds of gigabytes would keep all waiting for the first.
    own = slice(dist.get_rank(), None, dist.get_world_size()) if is_distributed() else slice(None)
    fault = LocalFault()
    with fault.caught():
        CheckpointStore(folder, keep=1).validate_files(path, dict(files[own]))
    fault.raise_once()
    return Checkpoint(path, read_state(path))


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are all there; changes nothing. Not collective.

    Raises:
        CheckpointError: It is of another version.
    """
    path = CheckpointStore(folder, keep=1).latest()
    return Checkpoint(path, read_state(path)) if path else None


def read_state(checkpoint: Path) -> TrainingState:
    """What a checkpoint says of its training.

    Raises:
        CheckpointError: The description is missing or of another version.
    """
    path = checkpoint / STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_format(path, content)
        return _checked(TrainingState(**content))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__}: {error}",
            rule="this version of piip-scale writes one into every checkpoint",
            fix=f"resume with the version that wrote it, or train a new run from its weights: {FROM_WEIGHTS}",
        ) from error


def _checked(state: TrainingState) -> TrainingState:
    """Refuses what is not of the types that are written: a checkpoint comes from wherever it was copied from."""
    for name in ("step", "num_ranks", "stage", "images_per_step", "steps_per_epoch"):
        if type(getattr(state, name)) is not int or getattr(state, name) < 0:
            raise ValueError(f"{name} is {getattr(state, name)!r}")
    names = [name for group in state.groups for name in group]
    texts = (state.precision, state.sets, *state.versions, *state.versions.values(), *state.shapes, *names)
    sizes = [size for shape in state.shapes.values() for size in shape]
    if not all(isinstance(text, str) for text in texts) or not all(type(size) is int for size in sizes):
        raise ValueError("a name is no text, or a size no number")
    _ = state.config["train"]["seed"]
    if type(_num_streams(state)) is not int or _num_streams(state) < 1:
        raise ValueError(f"data.num_streams is {_num_streams(state)!r}")
    return state


def warn_of_other_sets(path: Path, before: str, here: str) -> None:
    """Warns where sets were repaired or others put in their place.

    Args:
        path: The checkpoint.
        before: The sets that it was trained on, as ``Task.data_id`` says; empty where it does not say.
        here: Those of this run.
    """
    if before and before != here:
        get_logger(__name__).warning(
            "checkpoint %s was trained on other shards (%s; here %s): images may repeat or be left out until the next "
            "epoch, and metrics may not compare",
            path,
            before,
            here,
        )


def _newest(folder: Path) -> tuple[Path | None, list[tuple[str, dict[str, Any]]]]:
    """The newest checkpoint, and what its manifest says of its files."""
    store = CheckpointStore(folder, keep=1)
    store.clean()
    newest = store.latest()
    return newest, [*store.files_of(newest).items()] if newest else []


def _check(path: Path, saved: TrainingState, now: TrainingState) -> None:
    """Refuses what would load into the wrong place, or go on as another run."""
    _check_shapes(path, saved.shapes, now.shapes)
    for meaning, before, here in (
        ("train.precision", saved.precision, now.precision),
        ("images a step", saved.images_per_step, now.images_per_step),
        ("steps an epoch (data.train_shards)", saved.steps_per_epoch, now.steps_per_epoch),
        ("data.num_streams", _num_streams(saved), _num_streams(now)),
        ("train.seed", saved.config["train"]["seed"], now.config["train"]["seed"]),
    ):
        if before != here:
            raise _changed(path, meaning, before, here, "a run resumes as it was; only the ranks and zero may change")
    _check_trained(path, saved, now)
    if saved.groups != now.groups:
        raise CheckpointError(
            f"checkpoint {path} has other optimiser groups ({len(saved.groups)} against {len(now.groups)})",
            rule="weight_decay and layer_decay decide which parameters share one",
            fix="set optimizer.layer_decay and optimizer.weight_decay as they were",
        )


def _check_trained(path: Path, saved: TrainingState, now: TrainingState) -> None:
    """Other parameters that are trained: another cause than other rates, and another thing to mend."""
    before, here = ({name for group in state.groups for name in group} for state in (saved, now))
    problems = [
        _named("trained in the checkpoint and frozen here", sorted(before - here)),
        _named("frozen in the checkpoint and trained here", sorted(here - before)),
    ]
    if any(problems):
        raise CheckpointError(
            f"checkpoint {path} was trained with other parts frozen: {'; '.join(filter(None, problems))}",
            rule="frozen, frozen_blocks and the like decide which parameters have optimiser state",
            fix="set model.branches.N.frozen_blocks and what else freezes as it was, or train a new run from its "
            f"weights: {FROM_WEIGHTS}",
        )


def _changed(path: Path, meaning: str, before: object, here: object, rule: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} was written with {meaning} {before!r}, this run has {here!r}",
        rule=rule,
        fix=f"start it with {before!r} again, or train a new run from its weights: {FROM_WEIGHTS}",
    )


def _num_streams(state: TrainingState) -> Any:
    return state.config["data"]["num_streams"]


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
