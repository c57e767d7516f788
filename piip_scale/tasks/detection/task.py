"""Detection and instance segmentation: a ``Task`` over packed shards."""

from __future__ import annotations

from functools import cached_property

import PIL.Image
from torch import nn

from piip_scale.config.detection import DetectionRun
from piip_scale.data.batch import DetectionBatch
from piip_scale.data.images import Image
from piip_scale.data.reading.sample_set import SampleSet
from piip_scale.data.reading.shards import ShardSet
from piip_scale.data.samples.detection import DetectionSamples
from piip_scale.errors import DataError
from piip_scale.tasks.base import Detections
from piip_scale.tasks.detection.metric import CocoMetric
from piip_scale.tasks.drawing import DrawingStyle, draw_detections
from piip_scale.tasks.shard_task import ShardTask

MASK_KINDS = frozenset({"mask_rcnn", "cascade_mask_rcnn"})
"""Detectors that find masks."""


class DetectionTask(ShardTask[DetectionRun, DetectionBatch]):
    """Training and evaluating a detector."""

    def build_metric(self) -> CocoMetric:
        """A fresh metric over the validation set; masks count where detector and set have them."""
        with_masks = self.config.detector.kind in MASK_KINDS and self.val_set.has_masks
        return CocoMetric(self._ground_truth, with_masks)

    @cached_property
    def _ground_truth(self) -> dict[str, object]:
        return self.val_set.coco_ground_truth()

    def draw(self, pixels: Image, found: Detections, style: DrawingStyle) -> PIL.Image.Image:
        """An image, RGB uint8 (H, W, 3), with what the model found in it."""
        return draw_detections(pixels, found, self.classes, style)

    def _new_model(self, network_device: str | None = None) -> nn.Module:
        from piip_scale.tasks.detection.model import build_detection_model  # mmdet takes seconds to import

        return build_detection_model(self.config, len(self.classes), network_device)

    def _maker(self, shards: SampleSet) -> DetectionSamples:
        return DetectionSamples(shards, self.config.data.augment, polygons=self.config.data.polygons)

    @property
    def _groups_by_aspect(self) -> bool:
        return self.config.data.group_by_aspect

    def _check_train_shards(self, shards: ShardSet) -> None:
        if self.config.data.polygons and not shards.manifest.has_masks:
            raise DataError(
                f"the shards in {shards.location} hold boxes without masks", rule="data.polygons=True needs masks"
            )
        if self.config.detector.kind in MASK_KINDS and not shards.manifest.has_masks:
            raise DataError(
                f"the shards in {shards.location} hold boxes without masks",
                rule=f"detector.kind={self.config.detector.kind!r} trains on masks",
                fix="set detector.kind='faster_rcnn'",
            )
