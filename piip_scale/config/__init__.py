"""The settings of a run, and the checks it must pass before any process starts."""

from piip_scale.config.branches import BranchConfig, VitBranchConfig
from piip_scale.config.classification import ClassHeadConfig, ClassificationData, ClassificationRun, ImageAugmentConfig
from piip_scale.config.detection import AugmentConfig, DetectionData, DetectionRun, DetectorConfig
from piip_scale.config.interaction import InteractionConfig
from piip_scale.config.loading import load_config
from piip_scale.config.model import PiipConfig
from piip_scale.config.pyramid import PyramidConfig
from piip_scale.config.run import DataConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from piip_scale.config.telemetry import TelemetryConfig
from piip_scale.config.zero import ZeroConfig

__all__ = [
    "AugmentConfig",
    "BranchConfig",
    "ClassHeadConfig",
    "ClassificationData",
    "ClassificationRun",
    "DataConfig",
    "DetectionData",
    "DetectionRun",
    "DetectorConfig",
    "ImageAugmentConfig",
    "InteractionConfig",
    "OptimizerConfig",
    "PiipConfig",
    "PyramidConfig",
    "RunConfig",
    "ScheduleConfig",
    "TelemetryConfig",
    "TrainConfig",
    "VitBranchConfig",
    "ZeroConfig",
    "load_config",
]
