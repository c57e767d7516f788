"""Detecting in single images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import PIL.Image
import torch
from torch import nn

from piip_scale.config.detection import AugmentConfig, DetectionRun
from piip_scale.data.augment.canvas import canvas_of
from piip_scale.data.augment.transforms import evaluation_geometry
from piip_scale.data.batch import DetectionBatch, ImageInfo, Instances
from piip_scale.data.images import Image
from piip_scale.tasks.base import Detections
from piip_scale.tasks.drawing import DrawingStyle, draw_detections

if TYPE_CHECKING:
    from piip_scale.tasks.detection.model import DetectionModel

_MIN_SCORE = 0.5


def build_predictor(
    config: DetectionRun, model: nn.Module, classes: Sequence[str], min_score: float | None
) -> DetectionPredictor:
    """The registry's ``predictor`` of detection."""
    return DetectionPredictor(model, config.data.augment, classes, _MIN_SCORE if min_score is None else min_score)


class DetectionPredictor:
    """A detector on single images, in their own pixels: a ``Predictor``.

    Args:
        model: In eval mode, on any device.
        augment: Of its run; images are resized as for evaluation.
        classes: Names in label order.
        min_score: Detections below it are not drawn.
    """

    def __init__(self, model: nn.Module, augment: AugmentConfig, classes: Sequence[str], min_score: float) -> None:
        self._model, self._augment = cast("DetectionModel", model), augment
        self._classes, self._style = classes, DrawingStyle(min_score=min_score)

    def predict(self, pixels: Image, number: int = 1) -> Detections:
        """What the detector finds in an image, RGB uint8 (H, W, 3)."""
        height, width = pixels.shape[:2]
        geometry = evaluation_geometry((height, width), self._augment)
        images = canvas_of([geometry.image(pixels)], self._augment.pad_multiple_px)
        info = ImageInfo(f"image {number}", number, (height, width), geometry.size_px, geometry.scale_xy)
        nothing = Instances(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool))
        batch = DetectionBatch(images, (info,), (nothing,))
        return self._model.predict(batch.to(next(self._model.parameters()).device))[0]

    def draw(self, pixels: Image, found: Detections) -> PIL.Image.Image:
        """The image with boxes, masks, names and scores."""
        return draw_detections(pixels, found, self._classes, self._style)

    def entry(self, found: Detections) -> dict[str, Any]:
        """All detections; boxes are left, top, right, bottom in the image's pixels."""
        return {"objects": [self._object(found, index) for index in range(len(found.labels))]}

    def summary(self, found: Detections) -> str:
        """How many objects are drawn."""
        count = int((found.scores >= self._style.min_score).sum())
        return f"{count} objects of score {self._style.min_score} or more"

    def _object(self, found: Detections, index: int) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "class": self._classes[int(found.labels[index])],
            "score": round(found.scores[index].item(), 4),
            "box_xyxy_px": [round(edge, 2) for edge in found.boxes_xyxy_px[index].tolist()],
        }
        return entry if found.masks_rle is None else entry | {"mask_rle": found.masks_rle[index]}
