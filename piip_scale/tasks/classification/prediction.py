"""Classifying image files outside shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import PIL.Image
import torch
from torch import nn

from piip_scale.config.classification import ClassificationRun
from piip_scale.data.batch import ClassificationBatch, ImageInfo
from piip_scale.data.images import Image
from piip_scale.data.samples.classification import evaluation_transform
from piip_scale.tasks.classification.model import Classification, ClassificationModel
from piip_scale.tasks.drawing import draw_names


def build_predictor(
    config: ClassificationRun, model: nn.Module, classes: Sequence[str], min_score: float | None
) -> ClassPredictor:
    """The registry's ``predictor`` of classification: the best classes are drawn whatever they score."""
    return ClassPredictor(model, config, classes, min_score or 0.0)


class ClassPredictor:
    """A classifier on single images: a ``Predictor``.

    Args:
        model: In eval mode, on any device.
        config: Its run; images are resized and cut as for evaluation.
        classes: Names in label order.
        min_score: Classes of a lesser probability are not drawn.
    """

    def __init__(self, model: nn.Module, config: ClassificationRun, classes: Sequence[str], min_score: float) -> None:
        self._model, self._classes, self._min_score = cast(ClassificationModel, model), classes, min_score
        self._size_px = config.model.branches[-1].resolution_px
        self._transform = evaluation_transform(config.data.augment, self._size_px)

    def predict(self, pixels: Image, number: int = 1) -> Classification:
        """The best classes of an image, RGB uint8 (H, W, 3)."""
        image_BHWC = torch.from_numpy(np.array(self._transform(pixels)).transpose(1, 2, 0)[None])
        height, width = pixels.shape[:2]
        size = (self._size_px, self._size_px)
        info = ImageInfo(f"image {number}", number, (height, width), size, (size[1] / width, size[0] / height))
        batch = ClassificationBatch(image_BHWC, (info,), torch.zeros(1, dtype=torch.long))
        return self._model.predict(batch.to(next(self._model.parameters()).device))[0]

    def draw(self, pixels: Image, found: Classification) -> PIL.Image.Image:
        """The image with the names and probabilities of its best classes."""
        return draw_names(
            pixels, [(label, text) for label, text, value in self._best(found) if value >= self._min_score]
        )

    def entry(self, found: Classification) -> dict[str, Any]:
        """The best classes and their probabilities."""
        best = zip(found.labels.tolist(), found.probabilities.tolist(), strict=True)
        return {"classes": [{"class": self._classes[label], "probability": round(value, 4)} for label, value in best]}

    def summary(self, found: Classification) -> str:
        """The best class."""
        return self._best(found)[0][1]

    def _best(self, found: Classification) -> list[tuple[int, str, float]]:
        best = zip(found.labels.tolist(), found.probabilities.tolist(), strict=True)
        return [(label, f"{self._classes[label]} {value:.2f}", value) for label, value in best]
