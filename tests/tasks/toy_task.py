"""A fourth task in one module: what somebody writes who adds one, beside a row of the registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from piip_scale.config.run import RunConfig
from piip_scale.models.counting import PartCount, part_count
from piip_scale.models.piip import PIIP
from piip_scale.models.saved_activations import HeadBytes
from piip_scale.models.work import layer
from piip_scale.tasks.base import Outline
from piip_scale.tasks.counting import PyramidCounting
from piip_scale.tasks.heads import NetworkWithHeads

ROW = {
    "config": "toy_task:ToyRun",
    "set_kind": "classification",
    "task": "toy_task:ToyTask",
    "model": "toy_task:build_toy_model",
    "predictor": "toy_task:ToyPredictor",
    "views": "toy_task:predict_toy_views",
    "counting": "toy_task:ToyCounting",
    "outline": "toy_task:outline_toy",
    "training_size_px": "toy_task:training_size_px",
    "hub_pipeline": "image-feature-extraction",
}


def predict_toy_views(model, batches, views):
    """A number is the same from everywhere."""
    return model.predict(batches[0])


class ToyRun(RunConfig):
    """Predicts one number from an image's mean feature."""

    task: Literal["toy"]


class ToyTask:
    def __init__(self, config, world, broken_samples, val_set, sets) -> None:
        self.config, self.world = config, world


class ToyPredictor:
    def __init__(self, config, model, classes, min_score) -> None:
        self.classes, self.min_score = classes, min_score


def build_toy_model(config: ToyRun, num_classes: int, network_device: str | None = None) -> NetworkWithHeads:
    with torch.device(network_device or torch.get_default_device()):
        backbone = PIIP(config.model)
    return NetworkWithHeads(backbone, nn.Linear(backbone.feature_specs[-1].channels, num_classes))


@dataclass(frozen=True)
class ToyCounting(PyramidCounting):
    def heads(self, height_px: int, width_px: int, *, training: bool) -> tuple[PartCount, ...]:
        head = build_toy_model(self.config, self.num_classes).heads
        return (part_count("toy head", head, layer(head.weight.numel()), training=training),)


def outline_toy(config: ToyRun, num_classes: int, images_BCHW: Tensor, _device_type: str) -> Outline:
    model = build_toy_model(config, num_classes).train()
    model.set_precision(torch.bfloat16)

    def head_bytes(features: Sequence[Tensor]) -> HeadBytes:
        return HeadBytes(features[-1].numel(), features[-1].numel())

    return Outline(model, model.backbone, model.parts(), "heads", lambda: model.backbone(images_BCHW), head_bytes)


def training_size_px(config: ToyRun) -> tuple[int, int]:
    return 64, 96
