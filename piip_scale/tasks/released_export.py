"""Trained models as checkpoints for the released code: its names, its shapes, and files that its tools read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from piip_scale.checkpoint.tensor_file import write_tensors
from piip_scale.config.run import RunConfig
from piip_scale.errors import ModelError
from piip_scale.files import disk_errors
from piip_scale.models.lora import LORA
from piip_scale.models.misfits import describe_misfits, list_misfits
from piip_scale.models.released import released_name, released_network, released_shape
from piip_scale.models.statistics import recolouring
from piip_scale.models.whole_file import CLASSES
from piip_scale.registry import row_of
from piip_scale.tasks.base import DTYPES
from piip_scale.tasks.classes import class_names
from piip_scale.tasks.kinds import build_model
from piip_scale.tasks.weights import WeightSource

SUFFIXES = (".pth", ".safetensors")


def export_released(
    config: RunConfig, weights: WeightSource, out: Path, dtype: Literal["fp32", "bf16"] = "fp32"
) -> dict[str, tuple[int, ...]]:
    """Writes a whole model by the names of OpenGVLab's checkpoints, in memory for one tensor. Not collective.

    Args:
        config: Of the run that the weights come from.
        weights: Of the whole model.
        out: The file: ``.pth``, which mmcv loads, written by way of a file of the same size beside it; or
            ``.safetensors``.
        dtype: Of parameters. Floating-point buffers (running statistics) are float32.

    Returns:
        The shape of every tensor written, by its released name.

    Raises:
        ConfigError: Neither the config nor its shards name classes.
        ModelError: The weights are not this config's model, or the disk refuses; ``out`` is as it was then.
        PiipError: A tensor cannot be read.
    """
    _refuse_our_own(config, weights)
    classes = class_names(config)
    with torch.device("meta"):
        model = build_model(config, len(classes))
    state = model.state_dict()
    _check(weights, state)
    buffers = {name for name, _ in model.named_buffers()}
    dtypes = {name: _dtype(tensor, name in buffers, dtype) for name, tensor in state.items()}
    part = out.with_name(f".{out.name}.part")
    with disk_errors(ModelError, f"write {out}"):
        try:
            shapes = _write(part, config, weights, dtypes, classes)
            if out.suffix == ".pth":
                _as_pickle(part, row_of(config.task).released_key, classes)
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
    return shapes


def _refuse_our_own(config: RunConfig, weights: WeightSource) -> None:
    """What the released code has no names for."""
    if config.model.interaction.direction != "both":
        raise ModelError(
            f"weights {weights.name} cannot have released names: interaction.direction="
            f"{config.model.interaction.direction!r}",
            rule="the released units lead both ways",
        )
    augment = config.data.augment  # type: ignore[attr-defined]  # every task's data has one
    for index, branch in enumerate(config.model.branches):
        if recolouring(branch, augment.mean, augment.std) is not None:
            raise ModelError(
                f"weights {weights.name} cannot have released names: model.branches.{index}.mean={branch.mean} is not "
                f"data.augment.mean={augment.mean}, or its std",
                rule="the released code gives all branches one image",
            )
    if any(LORA in name for name in weights.shapes):
        raise ModelError(
            f"weights {weights.name} hold low-rank additions, which have no released names",
            fix="`piip-scale convert` merges them: export what it writes",
        )


def _dtype(tensor: Tensor, is_buffer: bool, dtype: str) -> torch.dtype:
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if is_buffer else DTYPES[dtype]


def _check(weights: WeightSource, state: Mapping[str, Tensor]) -> None:
    found = {name: torch.empty(shape, device="meta") for name, shape in weights.shapes.items()}
    misfits = list_misfits(found, state)
    if any(misfits.values()):
        raise ModelError(
            f"weights {weights.name} are not this config's model: {describe_misfits(misfits)}",
            fix="use the config of the run they come from",
        )


def _write(
    path: Path, config: RunConfig, weights: WeightSource, dtypes: Mapping[str, torch.dtype], classes: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    network = released_network(config.model)
    ours = {released_name(name, network): name for name in dtypes}
    shapes = {name: released_shape(name, tuple(weights.shapes[ours[name]])) for name in ours}
    entries = {name: (shapes[name], dtypes[ours[name]]) for name in ours}
    metadata = {"format": "pt", CLASSES: json.dumps(classes)}
    write_tensors(path, entries, metadata, lambda name: weights.read(ours[name], entries[name][1]))
    return shapes


def _as_pickle(path: Path, key: str, classes: tuple[str, ...]) -> None:
    """Puts a pickle in the place of a file of tensors, which are mapped on their way."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    content: dict[str, Any] = {"meta": {"CLASSES": classes}, key: tensors}
    pickled = path.with_name(f"{path.name}.pth")
    try:
        torch.save(content, pickled)
        pickled.replace(path)
    finally:
        pickled.unlink(missing_ok=True)
