"""What a classifier weighs, and what it costs for one image."""

from __future__ import annotations

from dataclasses import dataclass

from piip_scale.config.classification import ClassificationRun
from piip_scale.config.model import ClassifierConfig
from piip_scale.models.counting import PartCount, count_network


@dataclass(frozen=True)
class ClassificationCounting:
    """The count of a classifier, which has no pyramid: a ``Counting``.

    Attributes:
        config: The run.
        num_classes: Classes.
    """

    config: ClassificationRun
    num_classes: int

    def network(self, height_px: int, width_px: int, *, training: bool) -> tuple[PartCount, ...]:
        """See ``Counting.network``."""
        return self._parts(height_px, width_px, training)[:-1]

    def heads(self, height_px: int, width_px: int, *, training: bool) -> tuple[PartCount, ...]:
        """See ``Counting.heads``."""
        return self._parts(height_px, width_px, training)[-1:]

    def _parts(self, height_px: int, width_px: int, training: bool) -> tuple[PartCount, ...]:
        head = ClassifierConfig(num_classes=self.num_classes, separate=self.config.classifier.separate)
        batch = self.config.data.micro_batch_size if training else None
        return count_network(self.config.model, height_px, width_px, head, training_batch=batch)
