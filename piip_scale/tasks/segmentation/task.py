"""Semantic segmentation: a ``Task`` over packed shards."""

from __future__ import annotations

import PIL.Image
from torch import nn

from piip_scale.config.segmentation import SegmentationRun
from piip_scale.data.batch import SegmentationBatch
from piip_scale.data.images import Image
from piip_scale.data.reading.sample_set import SampleSet
from piip_scale.data.samples.segmentation import SegmentationSamples
from piip_scale.tasks.base import Segmentation
from piip_scale.tasks.drawing import DrawingStyle, draw_label_map
from piip_scale.tasks.segmentation.metric import SegmentationMetric
from piip_scale.tasks.shard_task import ShardTask


class SegmentationTask(ShardTask[SegmentationRun, SegmentationBatch]):
    """Training and evaluating a segmentor."""

    def build_metric(self) -> SegmentationMetric:
        """A fresh metric over the validation set."""
        return SegmentationMetric(self.classes)

    def draw(self, pixels: Image, found: Segmentation, style: DrawingStyle) -> PIL.Image.Image:
        """An image, RGB uint8 (H, W, 3), with what the model found in it."""
        return draw_label_map(pixels, found.labels_HW.numpy(), self.classes, style)

    def _new_model(self, network_device: str | None = None) -> nn.Module:
        from piip_scale.tasks.segmentation.model import build_segmentation_model  # mmseg takes seconds to import

        return build_segmentation_model(self.config, len(self.classes), network_device)

    def _maker(self, shards: SampleSet) -> SegmentationSamples:
        return SegmentationSamples(shards, self.config.data.augment)
