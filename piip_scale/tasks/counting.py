"""What a run's whole model weighs and costs, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from piip_scale.config.detection import DetectionRun
from piip_scale.config.run import RunConfig
from piip_scale.errors import ConfigError
from piip_scale.models.counting import PartCount, count_network, feature_maps
from piip_scale.tasks.classes import told_classes


@dataclass(frozen=True)
class RunCount:
    """The count of a whole model.

    Attributes:
        parts: The network's, then neck and heads.
        num_classes: Classes that the heads were built for.
        classes_told: Whether the config or its shards name them; otherwise they are as many as mmdet's own configs
            have.
    """

    parts: tuple[PartCount, ...]
    num_classes: int
    classes_told: bool


def count_run(config: RunConfig, height_px: int, width_px: int) -> RunCount:
    """Counts everything a run's model computes for one image at evaluation. Builds no weights.

    Args:
        config: The run.
        height_px: Height of the network's input, at the last branch's resolution.
        width_px: Width likewise.

    Raises:
        ConfigError: Heads that cannot be built, or that no rule counts.
        DataError: The run's shards are damaged.
    """
    if not isinstance(config, DetectionRun):
        raise ConfigError("config key task", value=config.task, rule="no rule counts its heads")
    from piip_scale.tasks.detector_config import BASE_CLASSES  # mmdet takes seconds to import
    from piip_scale.tasks.detector_counting import detector_parts

    classes = told_classes(config)
    num_classes = len(classes) or BASE_CLASSES
    heads = detector_parts(config.detector, feature_maps(config.model, height_px, width_px), num_classes)
    return RunCount((*count_network(config.model, height_px, width_px), *heads), num_classes, bool(classes))
