"""From a decoded sample to network input: what is drawn, and what becomes of the objects.

Scales, offsets and sizes are drawn and rounded as mmdet does (``RandomChoiceResize``, ``RandomResize``,
``RandomCrop``), except that a crop is rounded to whole pixels of the stored image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from piip_scale.config.run import AugmentConfig
from piip_scale.data.batch import MASK_SIZE_PX
from piip_scale.data.geometry import Geometry, Window
from piip_scale.data.masks import mini_mask, visible_bounds
from piip_scale.data.sample import Image, Sample

MIN_TARGET_PX = 0.01
"""Boxes that become smaller than this are no targets (as in mmdet's ``FilterAnnotations``)."""

Array = npt.NDArray[Any]
Size = tuple[int, int]


@dataclass(frozen=True)
class Target:
    """A sample as network input, in pixels of the new image.

    Attributes:
        pixels: RGB, uint8 (H, W, 3).
        boxes_xyxy_px: float32 (N, 4).
        labels: int64 (N,).
        is_crowd: bool (N,).
        mini_masks: uint8 (N, MASK_SIZE_PX, MASK_SIZE_PX); ``None`` for a set without masks.
    """

    pixels: Image
    boxes_xyxy_px: Array
    labels: Array
    is_crowd: Array
    mini_masks: Array | None


def evaluation_geometry(size_px: Size, augment: AugmentConfig) -> Geometry:
    """Without chance: the last of the short edges, the long edge within its bound."""
    return _whole(size_px, augment.short_edge_px[-1], augment.max_edge_px)


def training_geometry(size_px: Size, augment: AugmentConfig, rng: np.random.Generator) -> Geometry:
    """Large-scale jitter and a crop where configured, else one of the short edges; then perhaps a flip."""
    if augment.jitter_scale is not None and augment.crop_px is not None:
        ratio = rng.uniform(*augment.jitter_scale)
        # mmdet truncates here: the edges are whole pixels before the image is fitted into them.
        edges_px = [int(edge * ratio) for edge in augment.crop_px]
        geometry = _cropped(_whole(size_px, min(edges_px), max(edges_px)), augment.crop_px, rng)
    else:
        short_edge_px = augment.short_edge_px[int(rng.integers(len(augment.short_edge_px)))]
        geometry = _whole(size_px, short_edge_px, augment.max_edge_px)
    return Geometry(geometry.window, geometry.size_px, flip=bool(rng.random() < augment.flip_probability))


def apply_geometry(sample: Sample, geometry: Geometry) -> Target:
    """Moves image, boxes and masks; objects of which nothing is left are left out.

    Where the window cuts an object with a mask, its box becomes that of what remains of the mask (mmdet's
    ``recompute_bbox``).

    Raises:
        DataError: A mask cannot be decoded.
    """
    boxes = geometry.boxes(sample.boxes_xyxy_px)
    if sample.segmentations is not None:
        for index in np.flatnonzero(geometry.window.cuts(sample.boxes_xyxy_px)):
            bounds = visible_bounds(sample.segmentations[index], geometry.window)
            boxes[index] = 0 if bounds is None else geometry.boxes(bounds[None])[0]
    kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= MIN_TARGET_PX).all(axis=1))
    masks = None
    if sample.segmentations is not None:
        masks = np.empty((len(kept), MASK_SIZE_PX, MASK_SIZE_PX), np.uint8)
        for place, index in enumerate(kept):
            masks[place] = mini_mask(sample.segmentations[index], boxes[index], geometry)
    pixels = geometry.image(sample.pixels)
    return Target(pixels, boxes[kept].astype(np.float32), sample.labels[kept], sample.is_crowd[kept], masks)


def _whole(size_px: Size, short_edge_px: int, long_edge_px: int) -> Geometry:
    """The whole image, as large as its edges allow."""
    height, width = size_px
    factor = min(long_edge_px / max(size_px), short_edge_px / min(size_px))
    resized = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
    return Geometry(Window(0, 0, width, height), resized)


def _cropped(whole: Geometry, crop_px: Size, rng: np.random.Generator) -> Geometry:
    """A random window of the resized image, of the crop's size or what there is."""
    size = min(crop_px[0], whole.size_px[0]), min(crop_px[1], whole.size_px[1])
    top, left = (int(rng.integers(have - want, endpoint=True)) for have, want in zip(whole.size_px, size, strict=True))
    scale_x, scale_y = whole.scale_xy
    columns = _whole_pixels(left / scale_x, (left + size[1]) / scale_x)
    rows = _whole_pixels(top / scale_y, (top + size[0]) / scale_y)
    return Geometry(Window(columns[0], rows[0], columns[1], rows[1]), size)


def _whole_pixels(first: float, last: float) -> tuple[int, int]:
    low = int(first) if round(first) >= round(last) else round(first)
    return low, max(round(last), low + 1)
