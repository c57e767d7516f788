"""A trained model as a folder that others can use: weights, config, classes, preprocessing, and a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piip_scale import __version__
from piip_scale.checkpoint.dtypes import of_torch
from piip_scale.checkpoint.hub_layout import file_names, split_into_files, write_index
from piip_scale.checkpoint.output import Replacing
from piip_scale.checkpoint.safetensors_writer import Entry
from piip_scale.checkpoint.tensor_file import write_tensors
from piip_scale.errors import ModelError
from piip_scale.files import disk_errors
from piip_scale.run.run_dir import RunDirectory
from piip_scale.serving.model_card import Card, card_text
from piip_scale.serving.onnx_export import FILE as ONNX_FILE
from piip_scale.serving.onnx_export import OnnxReport, check_onnx, write_onnx
from piip_scale.tasks.classes import class_names
from piip_scale.tasks.exported import CONFIG, config_json
from piip_scale.tasks.kinds import build_model
from piip_scale.tasks.trained import Trained
from piip_scale.tasks.weights import WeightSource, check_weights

_MAX_FILE_GB = 5.0
_ONE_FILE = "model.safetensors"


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        files: In the folder.
        num_parameters: Elements of all parameters.
        num_metrics: Measured numbers in the card.
        onnx: Of the graph, where one was asked for.
    """

    files: tuple[str, ...]
    num_parameters: int
    num_metrics: int
    onnx: OnnxReport | None = None


def export_model(
    found: Trained,
    out: Path,
    *,
    metrics: Mapping[str, float],
    max_file_gb: float = _MAX_FILE_GB,
    onnx_size_px: tuple[int, int] | None = None,
) -> ExportReport:
    """Writes a folder as the Hugging Face hub lays out models. Not collective.

    Weights are read and written one tensor at a time, in float32. Nothing of the machine, the user or the sets gets
    into it but class names and metrics.

    Args:
        found: Config and weights.
        out: The folder; absent, or empty.
        metrics: Measured by ``evaluate`` or in training, for the card.
        max_file_gb: Largest size of a file in GB (10^9 bytes); a larger tensor has a file of its own.
        onnx_size_px: Height and width of the images of an ONNX graph, see ``write_onnx``; ``None`` writes none. It
            takes the memory of the model.

    Raises:
        ModelError: ``out`` holds something, the weights are not the config's, or the disk refuses; no part is left.
            Likewise where the graph cannot be written.
        CheckpointError: Another process is writing it.
        ConfigError: The config names no classes, or a place of this machine in what must be kept.
        PiipError: Weights cannot be read.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ModelError(f"{out} is there already", rule="exports go into a new folder", fix="choose another one")
    found = found.with_classes(classes := class_names(found.config))
    model = build_model(found.config, len(classes), network_device="meta")
    check_weights(model.state_dict(keep_vars=True), found.weights)
    state = model.state_dict()
    entries = [Entry(name, tuple(shape), of_torch(state[name].dtype)) for name, shape in found.weights.shapes.items()]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if onnx_size_px is not None:
        check_onnx(found.config, num_parameters, onnx_size_px)
    card = Card(out.resolve().name, found.config, classes, num_parameters, metrics, found.step)
    texts = {
        CONFIG: _json(config_json(found.config, classes, __version__)),
        "preprocessor_config.json": _json(preprocessing(found.config)),
        "README.md": card_text(card),
    }
    with disk_errors(ModelError, f"write {out}"), Replacing(out, is_folder=True) as replacing:
        for name, text in texts.items():
            (replacing.path / name).write_text(text, encoding="utf-8")
        _write_weights(replacing.path, split_into_files(entries, max_file_gb), found.weights)
        onnx = onnx_size_px and write_onnx(found.load(), found.config, onnx_size_px, replacing.path / ONNX_FILE)
    return ExportReport(tuple(sorted(path.name for path in out.iterdir())), num_parameters, len(metrics), onnx or None)


def measured_metrics(source: Path, step: int | None, *, averaged: bool, keeps_averages: bool) -> dict[str, float]:
    """What a run measured of the weights of one of its steps; empty where it did not, or ``source`` is no run.

    Args:
        source: A run's directory, or anything else.
        step: Of the weights.
        averaged: They are running averages.
        keeps_averages: The run keeps averages, which it then evaluates in place of the weights.
    """
    log = RunDirectory(source).metrics
    if step is None or averaged != keeps_averages or not log.is_file():
        return {}
    lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    measured = [line for line in lines if line.get("kind") == "evaluation" and line.get("step") == step]
    return {
        key.removeprefix("eval/"): value for key, value in (measured or [{}])[-1].items() if key.startswith("eval/")
    }


def preprocessing(config: Any) -> dict[str, Any]:
    """How images reach the network, in the terms of the hub's ``preprocessor_config.json``; values are of 0 to 1."""
    scale, augment = 1 / 255, config.data.augment
    return {
        "image_processor_type": "piip_scale",
        "do_rescale": True,
        "rescale_factor": scale,
        "do_normalize": True,
        "image_mean": [value * scale for value in augment.mean],
        "image_std": [value * scale for value in augment.std],
        "channels": "RGB",
        "evaluation": augment.model_dump(mode="json"),
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write_weights(folder: Path, files: list[list[Entry]], source: WeightSource) -> None:
    names = file_names(len(files)) if len(files) > 1 else [_ONE_FILE]
    for name, entries in zip(names, files, strict=True):
        dtypes = {entry.name: entry.dtype.to_torch() for entry in entries}
        write_tensors(
            folder / name,
            {entry.name: (tuple(entry.shape), dtypes[entry.name]) for entry in entries},
            {"format": "pt"},
            lambda key, dtypes=dtypes: source.read(key, dtypes[key]),  # type: ignore[misc]
        )
    if len(files) > 1:
        write_index(folder, dict(zip(names, files, strict=True)))
