"""Images of different sizes in one array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from piip_scale.data.images import Image
from piip_scale.data.reading.label_maps import IGNORED


def blank_canvas(
    sizes_px: Sequence[tuple[int, int]], multiple_px: int, least_px: tuple[int, int] | None = None
) -> tuple[Tensor, list[Image]]:
    """A canvas for images of some sizes that are yet to be drawn.

    Args:
        sizes_px: Height and width of each.
        multiple_px: Both sides of the canvas are multiples of it.
        least_px: Height and width that the canvas has at least, before that.

    Returns:
        The canvas, uint8 (B, H, W, 3), zero beside the images; and the place of each image, an array (H_i, W_i, 3) at
        the top left, which holds anything.
    """
    sizes = [*sizes_px, *([least_px] if least_px else [])]
    height, width = (-(-max(size[axis] for size in sizes) // multiple_px) * multiple_px for axis in (0, 1))
    # Zeroing all of it first would write most of it twice.
    canvas = np.empty((len(sizes_px), height, width, 3), np.uint8)
    for place, size in zip(canvas, sizes_px, strict=True):
        place[size[0] :] = 0
        place[: size[0], size[1] :] = 0
    places = [place[: size[0], : size[1]] for place, size in zip(canvas, sizes_px, strict=True)]
    return torch.from_numpy(canvas), places


def canvas_of(images: Sequence[Image], multiple_px: int, least_px: tuple[int, int] | None = None) -> Tensor:
    """A batch of images, each at the top left of a canvas that holds them all, zero elsewhere.

    Args:
        images: RGB, uint8 (H_i, W_i, 3).
        multiple_px: Both sides of the canvas are multiples of it.
        least_px: Height and width that the canvas has at least, before that.

    Returns:
        uint8 (B, H, W, 3).
    """
    canvas, places = blank_canvas([(image.shape[0], image.shape[1]) for image in images], multiple_px, least_px)
    for place, image in zip(places, images, strict=True):
        place[:] = image
    return canvas


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
