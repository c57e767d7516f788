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
from piip_scale.tasks.drawing import DrawingStyle, draw_names


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

    Attributes:
        classes: The names.
    """

    def __init__(self, model: nn.Module, config: ClassificationRun, classes: Sequence[str], min_score: float) -> None:
        self._model, self._min_score = cast(ClassificationModel, model), min_score
        self.classes = tuple(classes)
        self._size_px = config.model.branches[-1].resolution_px
        self._transform = evaluation_transform(config.data.augment, self._size_px)

    def predict(self, pixels: Image, number: int = 1) -> Classification:
        """The best classes of an image, RGB uint8 (H, W, 3)."""
        return self.predict_all([pixels], number)[0]

    def predict_all(self, images: Sequence[Image], first_number: int = 1) -> list[Classification]:
        """The same of several, which go through the network together."""
        size = (self._size_px, self._size_px)
        canvases = [np.array(self._transform(pixels)).transpose(1, 2, 0) for pixels in images]
        infos = tuple(
            ImageInfo(
                f"image {number}",
                number,
                pixels.shape[:2],
                size,
                (size[1] / pixels.shape[1], size[0] / pixels.shape[0]),
            )
            for number, pixels in enumerate(images, first_number)
        )
        nothing = torch.zeros(len(infos), dtype=torch.long)
        batch = ClassificationBatch(torch.from_numpy(np.stack(canvases)), infos, nothing)
        return self._model.predict(batch.to(next(self._model.parameters()).device))

    def draw(self, pixels: Image, found: Classification, style: DrawingStyle | None = None) -> PIL.Image.Image:
        """The image with the names and probabilities of its best classes."""
        names = [(label, text) for label, text, value in self._best(found) if value >= self._min_score]
        return draw_names(pixels, names, style)

    def entry(self, found: Classification) -> dict[str, Any]:
        """The best classes and their probabilities."""
        best = zip(found.labels.tolist(), found.probabilities.tolist(), strict=True)
        return {"classes": [{"class": self.classes[label], "probability": round(value, 4)} for label, value in best]}

    def summary(self, found: Classification) -> str:
        """The best class."""
        return self._best(found)[0][1]

    def rows(self, found: Classification) -> list[dict[str, Any]]:
        """A flat row a class, best first."""
        return list(self.entry(found)["classes"])

    def _best(self, found: Classification) -> list[tuple[int, str, float]]:
        best = zip(found.labels.tolist(), found.probabilities.tolist(), strict=True)
        return [(label, f"{self.classes[label]} {value:.2f}", value) for label, value in best]
