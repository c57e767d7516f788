"""Detecting in single images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import PIL.Image
import torch
from torch import Tensor, nn

from piip_scale.config.detection import AugmentConfig, DetectionRun
from piip_scale.data.augment.canvas import canvas_of
from piip_scale.data.augment.transforms import evaluation_geometry
from piip_scale.data.batch import DetectionBatch, ImageInfo, Instances
from piip_scale.data.images import Image
from piip_scale.tasks.base import Detections
from piip_scale.tasks.drawing import DrawingStyle, draw_detections
from piip_scale.tasks.one_size import by_size

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

    Attributes:
        classes: The names.
    """

    def __init__(self, model: nn.Module, augment: AugmentConfig, classes: Sequence[str], min_score: float) -> None:
        self._model, self._augment = cast("DetectionModel", model), augment
        self.classes, self._min_score = tuple(classes), min_score

    def predict(self, pixels: Image, number: int = 1) -> Detections:
        """What the detector finds in an image, RGB uint8 (H, W, 3)."""
        return self.predict_all([pixels], number)[0]

    def predict_all(self, images: Sequence[Image], first_number: int = 1) -> list[Detections]:
        """What it finds in several; those whose canvases are of one size go through the network together."""
        prepared = [self._prepared(pixels, number) for number, pixels in enumerate(images, first_number)]
        return by_size(prepared, lambda one: one[0].shape, self._found)

    def draw(self, pixels: Image, found: Detections, style: DrawingStyle | None = None) -> PIL.Image.Image:
        """The image with boxes, masks, names and scores."""
        return draw_detections(pixels, found, self.classes, replace(style or DrawingStyle(), min_score=self._min_score))

    def entry(self, found: Detections) -> dict[str, Any]:
        """All detections; boxes are left, top, right, bottom in the image's pixels."""
        return {"objects": [self._object(found, index) for index in range(len(found.labels))]}

    def summary(self, found: Detections) -> str:
        """How many objects are drawn."""
        count = int((found.scores >= self._min_score).sum())
        return f"{count} objects of score {self._min_score} or more"

    def rows(self, found: Detections) -> list[dict[str, Any]]:
        """All detections, a flat row each; edges in the image's pixels."""
        edges = ("left_px", "top_px", "right_px", "bottom_px")
        return [
            {"class": entry["class"], "score": entry["score"], **dict(zip(edges, entry["box_xyxy_px"], strict=True))}
            for entry in self.entry(found)["objects"]
        ]

    def _object(self, found: Detections, index: int) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "class": self.classes[int(found.labels[index])],
            "score": round(found.scores[index].item(), 4),
            "box_xyxy_px": [round(edge, 2) for edge in found.boxes_xyxy_px[index].tolist()],
        }
        return entry if found.masks_rle is None else entry | {"mask_rle": found.masks_rle[index]}

    def _prepared(self, pixels: Image, number: int) -> tuple[Tensor, ImageInfo]:
        height, width = pixels.shape[:2]
        geometry = evaluation_geometry((height, width), self._augment)
        canvas = canvas_of([geometry.image(pixels)], self._augment.pad_multiple_px)
        return canvas, ImageInfo(f"image {number}", number, (height, width), geometry.size_px, geometry.scale_xy)

    def _found(self, prepared: Sequence[tuple[Tensor, ImageInfo]]) -> list[Detections]:
        nothing = Instances(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool))
        canvases, infos = zip(*prepared, strict=True)
        batch = DetectionBatch(torch.cat(canvases), infos, (nothing,) * len(infos))
        return self._model.predict(batch.to(next(self._model.parameters()).device))
