"""The tasks, one row each: what a run of each is built of.

A new task is one folder of ``tasks/``, a config class, and a row here; nothing else asks which task a run has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from piip_scale.errors import ConfigError

SetKind = Literal["detection", "classification", "segmentation"]
"""What a packed set's samples are labelled with; see ``data.set_kinds``."""


@dataclass(frozen=True)
class PublicSet:
    """The set that a task is counted for where neither config nor shards name classes.

    Attributes:
        name: As the literature calls it.
        num_classes: Its classes.
    """

    name: str
    num_classes: int


@dataclass(frozen=True)
class TaskRow:
    """A task's parts, each named as ``module:attribute`` and imported when it is first asked for.

    Named as entry points are: a classifier's run must not import mmdet, and the config of all tasks lies in a layer
    below their models. ``tasks.kinds``, ``tasks.counting`` and ``tasks.outline`` call the parts and say what they take.

    Attributes:
        config: The ``RunConfig`` of its runs, whose ``task`` is the row's key.
        set_kind: The kind of packed sets it trains on, see ``data.set_kinds``.
        task: The ``Task``, of config, world, the folder for broken samples and a set to evaluate on.
        model: The model with random weights, of config, number of classes and the device of its network.
        predictor: The ``Predictor``, of config, model, class names and the least score to draw.
        views: What a model finds in several views of a batch, merged: of model, batches of each scale and ``Views``.
        counting: The ``Counting`` of its network and heads, of config and number of classes.
        outline: The ``Outline`` for planning memory, of config, number of classes, images on the meta device
            and the type of device that it is planned for.
        training_size_px: Height and width of the largest micro-batch that training can meet, of config.
        public_set: Counted for by default.
        hub_pipeline: What the Hugging Face hub calls it.
        finds_objects: A predictor finds ``Detections``.
        released_key: Under which the released tools look for the weights of a checkpoint.
    """

    config: str
    set_kind: SetKind
    task: str
    model: str
    predictor: str
    views: str
    counting: str
    outline: str
    training_size_px: str
    public_set: PublicSet
    hub_pipeline: str
    finds_objects: bool = False
    released_key: str = "state_dict"

    def load(self, part: str) -> Any:
        """The part of this name, imported."""
        module, _, attribute = getattr(self, part).partition(":")
        return getattr(import_module(module), attribute)


TASKS: dict[str, TaskRow] = {
    "detection": TaskRow(
        config="piip_scale.config.detection:DetectionRun",
        set_kind="detection",
        task="piip_scale.tasks.detection.task:DetectionTask",
        model="piip_scale.tasks.detection.model:build_detection_model",
        predictor="piip_scale.tasks.detection.prediction:build_predictor",
        views="piip_scale.tasks.detection.views:predict_views",
        counting="piip_scale.tasks.detection.counting:DetectionCounting",
        outline="piip_scale.tasks.detection.memory:outline_detector",
        training_size_px="piip_scale.tasks.detection.training_size:training_size_px",
        public_set=PublicSet("COCO", 80),
        hub_pipeline="object-detection",
        finds_objects=True,
    ),
    "segmentation": TaskRow(
        config="piip_scale.config.segmentation:SegmentationRun",
        set_kind="segmentation",
        task="piip_scale.tasks.segmentation.task:SegmentationTask",
        model="piip_scale.tasks.segmentation.model:build_segmentation_model",
        predictor="piip_scale.tasks.segmentation.prediction:build_predictor",
        views="piip_scale.tasks.segmentation.views:predict_views",
        counting="piip_scale.tasks.segmentation.counting:SegmentationCounting",
        outline="piip_scale.tasks.segmentation.memory:outline_segmentor",
        training_size_px="piip_scale.tasks.segmentation.training_size:training_size_px",
        public_set=PublicSet("ADE20K", 150),
        hub_pipeline="image-segmentation",
    ),
    "classification": TaskRow(
        config="piip_scale.config.classification:ClassificationRun",
        set_kind="classification",
        task="piip_scale.tasks.classification.task:ClassificationTask",
        model="piip_scale.tasks.classification.model:build_classification_model",
        predictor="piip_scale.tasks.classification.prediction:build_predictor",
        views="piip_scale.tasks.classification.views:predict_views",
        counting="piip_scale.tasks.classification.counting:ClassificationCounting",
        outline="piip_scale.tasks.classification.memory:outline_classifier",
        training_size_px="piip_scale.tasks.classification.training_size:training_size_px",
        public_set=PublicSet("ImageNet", 1000),
        hub_pipeline="image-classification",
        released_key="model",  # as DeiT's
    ),
}
"""By the value of the config key ``task``."""

DEFAULT_TASK = "detection"
"""Of a config that names none."""


def row_of(task: object) -> TaskRow:
    """The row of a task by its name.

    Raises:
        ConfigError: There is none.
    """
    if not isinstance(task, str) or task not in TASKS:
        raise ConfigError("config key task", value=task, rule=f"it must be one of {', '.join(TASKS)}")
    return TASKS[task]


def config_class(values: Mapping[str, Any]) -> Any:
    """The config class for a run's plain values.

    Raises:
        ConfigError: A task that has no row.
    """
    return row_of(values.get("task", DEFAULT_TASK)).load("config")
