"""Classification: a ``Task`` over packed shards."""

from __future__ import annotations

from torch import nn

from piip_scale.config.classification import ClassificationRun
from piip_scale.data.batch import ClassificationBatch
from piip_scale.data.reading.sample_set import SampleSet
from piip_scale.data.samples.classification import ClassificationSamples
from piip_scale.tasks.classification.metric import AccuracyMetric
from piip_scale.tasks.classification.model import build_classification_model
from piip_scale.tasks.shard_task import ShardTask


class ClassificationTask(ShardTask[ClassificationRun, ClassificationBatch]):
    """Training and evaluating a classifier."""

    def build_metric(self) -> AccuracyMetric:
        """A fresh metric over the validation set."""
        return AccuracyMetric(self.classes)

    def _new_model(self, network_device: str | None = None) -> nn.Module:
        return build_classification_model(self.config, len(self.classes), network_device)

    def _maker(self, shards: SampleSet) -> ClassificationSamples:
        size_px = self.config.model.branches[-1].resolution_px
        return ClassificationSamples(shards, self.config.data.augment, size_px, self.config.classifier.label_smoothing)
