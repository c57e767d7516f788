"""A segmentor on single images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from piip_scale.config.segmentation import SegmentationAugment, SegmentationRun
from piip_scale.data.augment.canvas import canvas_of
from piip_scale.data.augment.map_transforms import resized, resized_px
from piip_scale.data.batch import ImageInfo, SegmentationBatch
from piip_scale.data.images import Image
from piip_scale.tasks.base import Segmentation
from piip_scale.tasks.drawing import DrawingStyle, draw_label_map
from piip_scale.tasks.one_size import by_size
from piip_scale.tasks.segmentation.metric import area_shares

if TYPE_CHECKING:
    from piip_scale.tasks.segmentation.model import SegmentationModel

_MOST_NAMED = 3


def build_predictor(
    config: SegmentationRun, model: nn.Module, classes: Sequence[str], min_score: float | None
) -> SegmentationPredictor:
    """The registry's ``predictor`` of segmentation: every pixel has a class, whatever it scores."""
    return SegmentationPredictor(model, config.data.augment, classes)


class SegmentationPredictor:
    """A segmentor on single images, in their own pixels: a ``Predictor``.

    Args:
        model: In eval mode, on any device.
        augment: Of its run; images are resized as for evaluation.
        classes: Names in label order.

    Attributes:
        classes: The names.
    """

    def __init__(self, model: nn.Module, augment: SegmentationAugment, classes: Sequence[str]) -> None:
        self._model, self._augment = cast("SegmentationModel", model), augment
        self.classes = tuple(classes)

    def predict(self, pixels: Image, number: int = 1) -> Segmentation:
        """The class of every pixel of an image, RGB uint8 (H, W, 3)."""
        return self.predict_all([pixels], number)[0]

    def predict_all(self, images: Sequence[Image], first_number: int = 1) -> list[Segmentation]:
        """The same of several; those whose canvases are of one size go through the network together."""
        prepared = [self._prepared(pixels, number) for number, pixels in enumerate(images, first_number)]
        return by_size(prepared, lambda one: one[0].shape, self._found)

    def draw(self, pixels: Image, found: Segmentation, style: DrawingStyle | None = None) -> PIL.Image.Image:
        """The image with the classes of its pixels over it, and the names of the largest."""
        return draw_label_map(pixels, found.labels_HW.numpy(), self.classes, style)

    def entry(self, found: Segmentation) -> dict[str, Any]:
        """The share of the image that each class takes."""
        areas_px = np.bincount(found.labels_HW.numpy().ravel(), minlength=len(self.classes))
        return area_shares(areas_px, self.classes)

    def summary(self, found: Segmentation) -> str:
        """The classes that take most of the image."""
        shares = self.entry(found)["classes"][:_MOST_NAMED]
        return ", ".join(f"{entry['class']} {entry['area_share']:.0%}" for entry in shares)

    def rows(self, found: Segmentation) -> list[dict[str, Any]]:
        """A flat row a class: its name and its share of the image."""
        return list(self.entry(found)["classes"])

    def _prepared(self, pixels: Image, number: int) -> tuple[Tensor, ImageInfo]:
        stored_px = (pixels.shape[0], pixels.shape[1])
        size_px = resized_px(stored_px, self._augment.short_edge_px, self._augment.max_edge_px)
        canvas = canvas_of([resized(pixels, size_px)], self._augment.pad_multiple_px)
        scale_xy = (size_px[1] / stored_px[1], size_px[0] / stored_px[0])
        return canvas, ImageInfo(f"image {number}", number, stored_px, size_px, scale_xy)

    def _found(self, prepared: Sequence[tuple[Tensor, ImageInfo]]) -> list[Segmentation]:
        canvases, infos = zip(*prepared, strict=True)
        batch = SegmentationBatch(torch.cat(canvases), infos, torch.zeros(len(infos), 0, 0, dtype=torch.uint8))
        return self._model.predict(batch.to(next(self._model.parameters()).device))
