"""The config class of each task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from piip_scale.config.classification import ClassificationRun
from piip_scale.config.detection import DetectionRun
from piip_scale.config.run import RunConfig
from piip_scale.config.segmentation import SegmentationRun
from piip_scale.errors import ConfigError

RUN_KINDS: dict[str, type[RunConfig]] = {
    "detection": DetectionRun,
    "segmentation": SegmentationRun,
    "classification": ClassificationRun,
}
"""By the value of the config key ``task``."""


def run_kind(values: Mapping[str, Any]) -> type[RunConfig]:
    """The config class for plain values; detection where they name no task.

    Raises:
        ConfigError: A task there is no such class for.
    """
    task = values.get("task", "detection")
    if not isinstance(task, str) or task not in RUN_KINDS:
        raise ConfigError("config key task", value=task, rule=f"it must be one of {', '.join(RUN_KINDS)}")
    return RUN_KINDS[task]
