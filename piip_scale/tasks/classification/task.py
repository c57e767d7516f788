"""Classification: a ``Task`` over packed shards."""

from __future__ import annotations

import PIL.Image
from torch import nn

from piip_scale.config.classification import ClassificationRun
from piip_scale.data.batch import ClassificationBatch
from piip_scale.data.images import Image
from piip_scale.data.reading.sample_set import SampleSet
from piip_scale.data.samples.classification import ClassificationSamples
from piip_scale.tasks.classification.cases import draw_guesses
from piip_scale.tasks.classification.metric import AccuracyMetric
from piip_scale.tasks.classification.model import Classification, build_classification_model
from piip_scale.tasks.drawing import DrawingStyle
from piip_scale.tasks.shard_task import ShardTask


class ClassificationTask(ShardTask[ClassificationRun, ClassificationBatch]):
    """Training and evaluating a classifier."""

    def build_metric(self) -> AccuracyMetric:
        """A fresh metric over the validation set."""
        return AccuracyMetric(self.classes)

    def draw(self, pixels: Image, found: Classification, style: DrawingStyle) -> PIL.Image.Image:
        """An image, RGB uint8 (H, W, 3), with what the model found in it."""
        return draw_guesses(found.labels.tolist(), found.probabilities.tolist(), self.classes, pixels, style)

    def _new_model(self, network_device: str | None = None) -> nn.Module:
        return build_classification_model(self.config, len(self.classes), network_device)

    def _maker(self, shards: SampleSet) -> ClassificationSamples:
        size_px = self.config.model.branches[-1].resolution_px
        return ClassificationSamples(shards, self.config.data.augment, size_px, self.config.classifier.label_smoothing)
