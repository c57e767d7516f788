"""From a run's config to its task, its model and what draws its predictions; a new task is entered here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from piip_scale.config.classification import ClassificationRun
from piip_scale.config.detection import DetectionRun
from piip_scale.config.run import RunConfig
from piip_scale.config.segmentation import SegmentationRun
from piip_scale.errors import ConfigError
from piip_scale.tasks.classes import class_names
from piip_scale.world import World

if TYPE_CHECKING:
    from piip_scale.tasks.base import Predictor, Task


def build_task(config: RunConfig, world: World, broken_samples: Path | None = None) -> Task:
    """The task of a run.

    Args:
        config: The run.
        world: This rank among all.
        broken_samples: A folder of the run where its ranks put down which samples are broken, if it has one.

    Raises:
        DataError: Validation shards that are absent, damaged, or of other classes than the config's.
    """
    if isinstance(config, DetectionRun):
        from piip_scale.tasks.detection.task import DetectionTask

        return DetectionTask(config, world, broken_samples)
    if isinstance(config, ClassificationRun):
        from piip_scale.tasks.classification.task import ClassificationTask

        return ClassificationTask(config, world, broken_samples)
    if isinstance(config, SegmentationRun):
        from piip_scale.tasks.segmentation.task import SegmentationTask

        return SegmentationTask(config, world, broken_samples)
    raise _unknown(config)


def build_model(config: RunConfig, num_classes: int) -> nn.Module:
    """The model of a run with random weights, on torch's default device in float32; needs no shards.

    Raises:
        ConfigError: Heads that cannot be built as the config says.
        KernelError: A kernel that the config names cannot be had.
    """
    if isinstance(config, DetectionRun):
        from piip_scale.tasks.detection.model import build_detection_model

        return build_detection_model(config, num_classes)
    if isinstance(config, ClassificationRun):
        from piip_scale.tasks.classification.model import build_classification_model

        return build_classification_model(config, num_classes)
    if isinstance(config, SegmentationRun):
        from piip_scale.tasks.segmentation.model import build_segmentation_model

        return build_segmentation_model(config, num_classes)
    raise _unknown(config)


def load_model(config: RunConfig, weights: Path) -> nn.Module:
    """A trained model in eval mode, on the CPU in float32.

    Args:
        config: Of the run that the weights come from.
        weights: A safetensors file, or a folder of them.

    Raises:
        ModelError: The file is absent or damaged, or its weights are not this model's.
        ConfigError: The classes cannot be told.
    """
    from piip_scale.tasks.weights import load_weights

    model = build_model(config, len(class_names(config)))
    load_weights(model, weights)
    return model.eval()


def build_predictor(config: RunConfig, model: nn.Module, min_score: float | None) -> Predictor:
    """What a trained model finds in single images, drawn and written down.

    Args:
        config: Of the run that the weights come from.
        model: From ``load_model``, on any device.
        min_score: What scores less is not drawn; ``None`` is 0.5 for objects, 0 for classes.

    Raises:
        ConfigError: The classes cannot be told.
    """
    if isinstance(config, DetectionRun):
        from piip_scale.tasks.detection.prediction import DetectionPredictor

        return DetectionPredictor(
            model, config.data.augment, class_names(config), 0.5 if min_score is None else min_score
        )
    if isinstance(config, ClassificationRun):
        from piip_scale.tasks.classification.prediction import ClassPredictor

        return ClassPredictor(model, config, class_names(config), min_score or 0.0)
    if isinstance(config, SegmentationRun):
        from piip_scale.tasks.segmentation.prediction import SegmentationPredictor

        return SegmentationPredictor(model, config.data.augment, class_names(config))
    raise _unknown(config)


def _unknown(config: RunConfig) -> ConfigError:
    return ConfigError("config key task", value=config.task, rule="there is no such task")
