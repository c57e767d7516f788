"""A trained model by what a user names: a config and weights, or a run's directory alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from piip_scale.checkpoint.store import CheckpointStore, find_checkpoint, read_step, resolve_checkpoint
from piip_scale.config.branches import VitBranchConfig
from piip_scale.config.loading import load_config
from piip_scale.config.run import RunConfig
from piip_scale.errors import CheckpointError, ConfigError, ModelError
from piip_scale.models.frozen_files import reader_of
from piip_scale.models.lora import LORA
from piip_scale.run.run_dir import RunDirectory
from piip_scale.tasks.base import DTYPES
from piip_scale.tasks.classes import class_names, naming
from piip_scale.tasks.exported import is_exported, read_exported
from piip_scale.tasks.kinds import build_model
from piip_scale.tasks.spreading import Spread
from piip_scale.tasks.weights import CheckpointWeights, SafetensorsWeights, StoredInModel, WeightSource, load_weights


@dataclass(frozen=True)
class Trained:
    """A config with the weights that belong to it; nothing of the model is in memory yet.

    Attributes:
        config: The run.
        weights: Where its weights are.
        step: Optimiser steps behind them; ``None`` where only the file itself could say.
    """

    config: RunConfig
    weights: WeightSource
    step: int | None = None

    def with_classes(self, classes: Sequence[str]) -> Trained:
        """The same with the classes of a set, where the config names none."""
        return self if self.config.data.classes else replace(self, config=naming(self.config, classes))

    def load(
        self,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        *,
        spread_over: Sequence[torch.device] = (),
    ) -> nn.Module:
        """The model, a ``TrainableModel`` in eval mode. Not collective.

        The network is never drawn, and in memory once: on a CPU, weights that are stored in the dtype they are used in
        stay the file's own pages; on other devices they are nowhere else.

        Args:
            precision: Of the network, ``fp32`` or ``bf16``; neck and heads are float32 in both.
            device: Where it goes.
            spread_over: Its parts go on these instead, as much on each as its free memory has room for. Whoever calls
                it puts what it takes on the device of its first parameter.

        Raises:
            ModelError: The weights are not this model's, or do not fit.
            ConfigError: Neither the config nor its shards name classes; or heads cannot be built.
            PiipError: The weights cannot be read.
        """
        model = build_model(self.config, len(class_names(self.config)), network_device="meta")
        model.set_precision(DTYPES[precision])  # type: ignore[operator]  # a TrainableModel
        weights = StoredInModel(model, self.weights)
        if spread_over:
            spread = Spread(model, spread_over)
            load_weights(model, weights, spread.by_name)
            spread.settle()
        else:
            load_weights(model, weights, dict.fromkeys(model.state_dict(), torch.device(device)))
            model.to(device)
        return model.eval()


def find_trained(
    source: Path,
    weights: Path | None = None,
    *,
    overrides: Sequence[str] = (),
    step: int | None = None,
    averaged: bool = False,
) -> Trained:
    """What a user means by ``CONFIG WEIGHTS``, ``RUN``, ``RUN WEIGHTS`` or an exported model. Not collective.

    Writes nothing.

    Args:
        source: A config file, a run's directory with the config and checkpoints of its own, or an exported model.
        weights: A ``.safetensors`` file, a folder of them, or a checkpoint as ``convert`` takes one; ``None`` takes the
            run's newest whole checkpoint. Files of a checkpoint are held to their sizes, not to their checksums.
        overrides: Changes to the config, as ``load_config`` takes them.
        step: The checkpoint of this step, not the newest.
        averaged: The running averages of the weights (``train.ema_decay``).

    Raises:
        ConfigError: The config cannot be used, or ``source`` is a config and weights are not named.
        CheckpointError: There is no such checkpoint, or it holds no averages.
        ModelError: Weights are absent or damaged, or ``step`` or ``averaged`` is asked of converted ones.
    """
    if is_exported(source):
        config, weights = read_exported(source, overrides), weights or source
    else:
        config = load_config(_config_of(source), overrides)
    if weights is not None and not _holds_checkpoint(weights):
        _refuse_choice(weights, step, averaged)
        converted = SafetensorsWeights(weights)
        return Trained(_as_merged(config, converted), converted)
    if weights is None and not source.is_dir():
        raise ConfigError(
            f"config {source} comes without weights",
            rule="a run's directory has checkpoints, a config file has none",
            fix="name weights after it (.safetensors, or a checkpoint), or give the run's directory in its place",
        )
    checkpoint = _checkpoint(weights or source, step)
    return Trained(
        config, CheckpointWeights(checkpoint, averaged=averaged, given=reader_of(config.model)), read_step(checkpoint)
    )


def holds_weights(path: Path) -> bool:
    """Whether a folder is one of weights, or of a checkpoint."""
    return path.is_dir() and (any(path.glob("*.safetensors")) or _holds_checkpoint(path))


def _as_merged(config: RunConfig, weights: WeightSource) -> RunConfig:
    """The config without low-rank additions where the weights have none: converting merges them, in floats."""
    if any(LORA in name for name in weights.shapes):
        return config
    merged = {"lora": None, "frozen_dtype": "run"}
    branches = tuple(
        branch.model_copy(update=merged) if isinstance(branch, VitBranchConfig) and branch.lora else branch
        for branch in config.model.branches
    )
    return config.model_copy(update={"model": config.model.model_copy(update={"branches": branches})})


def _config_of(source: Path) -> Path:
    if not source.is_dir():
        return source
    run = RunDirectory(source)
    # What the last resume changed, in sets for example, is what the run is now.
    config = run.newest_config
    if not config.is_file():
        raise ConfigError(
            f"{source} is no run's directory",
            rule=f"a run keeps its config in {run.config.name}",
            fix="give the directory that --run-dir named, or a config file and weights",
        )
    return config


def _holds_checkpoint(path: Path) -> bool:
    return path.is_dir() and not any(path.glob("*.safetensors")) and find_checkpoint(path) is not None


def _refuse_choice(weights: Path, step: int | None, averaged: bool) -> None:
    if step is not None or averaged:
        raise ModelError(
            f"weights {weights} are of one step and kind",
            value="--ema" if averaged else f"--step {step}",
            rule="--step and --ema choose among what a checkpoint holds",
            fix="leave them out, or leave out the weights to read the run's own checkpoints",
        )


def _checkpoint(path: Path, step: int | None) -> Path:
    if step is None:
        return resolve_checkpoint(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    store = CheckpointStore(folder, keep=1)
    if step not in store.steps():
        raise CheckpointError(
            f"no checkpoint of step {step} in {folder}",
            rule=f"there are those of {', '.join(map(str, store.steps())) or 'no step'}",
            fix="choose one of them" if store.steps() else "",
        )
    return resolve_checkpoint(store.path(step))
