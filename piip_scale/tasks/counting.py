"""What a run's whole model weighs and costs, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from piip_scale.config.classification import ClassificationRun
from piip_scale.config.detection import DetectionRun
from piip_scale.config.model import ClassifierConfig
from piip_scale.config.run import RunConfig
from piip_scale.config.segmentation import SegmentationRun
from piip_scale.models.counting import PartCount, count_network, feature_maps
from piip_scale.tasks.classes import declared_classes

_PUBLIC_SETS = {"classification": ("ImageNet", 1000), "detection": ("COCO", 80), "segmentation": ("ADE20K", 150)}
"""By task: the set that is counted for, and its classes, where a run's own are not known."""


@dataclass(frozen=True)
class RunCount:
    """The count of a whole model.

    Attributes:
        parts: The network's, then what follows it.
        num_classes: Classes that the heads were built for.
        assumed_set: The public set that has so many, where neither the config nor its shards name any; else empty.
    """

    parts: tuple[PartCount, ...]
    num_classes: int
    assumed_set: str


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
    name, num_classes = likely_classes(config)
    return RunCount(_parts(config, num_classes, height_px, width_px), num_classes, name)


def likely_classes(config: RunConfig) -> tuple[str, int]:
    """How many classes a run has, and the public set whose number it is where neither config nor shards tell.

    Raises:
        DataError: The run's shards are damaged.
    """
    classes = declared_classes(config)
    return ("", len(classes)) if classes else _PUBLIC_SETS[config.task]


def _parts(config: RunConfig, num_classes: int, height_px: int, width_px: int) -> tuple[PartCount, ...]:
    if isinstance(config, ClassificationRun):
        head = ClassifierConfig(num_classes=num_classes, separate=config.classifier.separate)
        return count_network(config.model, height_px, width_px, head)
    network = count_network(config.model, height_px, width_px)
    features = feature_maps(config.model, height_px, width_px)
    if isinstance(config, SegmentationRun):
        from piip_scale.tasks.segmentation.counting import segmentor_parts  # so does mmseg

        return (*network, *segmentor_parts(config.segmentor, features, num_classes))
    assert isinstance(config, DetectionRun)
    from piip_scale.tasks.detection.counting import detector_parts  # mmdet takes seconds to import

    return (*network, *detector_parts(config.detector, features, num_classes))
