"""Images of different sizes in one array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from piip_scale.data.label_maps import IGNORED
from piip_scale.data.sample import Image


def canvas_of(images: Sequence[Image], multiple_px: int, least_px: tuple[int, int] | None = None) -> Tensor:
    """A batch of images, each at the top left of a canvas that holds them all, zero elsewhere.

    Args:
        images: RGB, uint8 (H_i, W_i, 3).
        multiple_px: Both sides of the canvas are multiples of it.
        least_px: Height and width that the canvas has at least, before that.

    Returns:
        uint8 (B, H, W, 3).
    """
    sizes = [image.shape[:2] for image in images] + ([least_px] if least_px else [])
    height, width = (-(-max(size[axis] for size in sizes) // multiple_px) * multiple_px for axis in (0, 1))
    canvas = np.zeros((len(images), height, width, 3), np.uint8)
    for place, image in zip(canvas, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(canvas)


def label_canvas_of(label_maps: Sequence[Image], least_px: tuple[int, int] | None = None) -> Image:
    """A batch of label maps, each at the top left of a canvas that holds them all, ``IGNORED`` elsewhere.

    Args:
        label_maps: uint8 (H_i, W_i).
        least_px: Height and width that the canvas has at least.

    Returns:
        uint8 (B, H, W).
    """
    sizes = [labels.shape for labels in label_maps] + ([least_px] if least_px else [])
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    canvas = np.full((len(label_maps), height, width), IGNORED, np.uint8)
    for place, labels in zip(canvas, label_maps, strict=True):
        place[: labels.shape[0], : labels.shape[1]] = labels
    return canvas
