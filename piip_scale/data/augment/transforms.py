"""From a decoded sample to network input: what is drawn, and what becomes of the objects.

Scales, offsets and sizes are drawn and rounded as mmdet does (``RandomChoiceResize``, ``RandomResize``, ``RandomCrop``
and ``RandomChoice`` of them), except that a crop is rounded to whole pixels of the stored image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from piip_scale.config.detection import AugmentConfig, CropFirstConfig
from piip_scale.data.augment.geometry import Geometry, Window
from piip_scale.data.augment.masks import Shapes
from piip_scale.data.reading.decoding import Sample

MIN_TARGET_PX = 0.01
"""Boxes that become smaller than this are no targets (as in mmdet's ``FilterAnnotations``)."""

Array = npt.NDArray[Any]
Size = tuple[int, int]


@dataclass(frozen=True)
class Target:
    """The objects of a sample in pixels of the new image.

    Attributes:
        boxes_xyxy_px: float32 (N, 4).
        labels: int64 (N,).
        is_crowd: bool (N,).
        mini_masks: uint8 (N, MASK_SIZE_PX, MASK_SIZE_PX); ``None`` for a set without masks.
        polygons: Each object's outlines, float64 (M, 2), cut to the image; ``None`` where nobody asked.
    """

    boxes_xyxy_px: Array
    labels: Array
    is_crowd: Array
    mini_masks: Array | None
    polygons: list[list[Array]] | None = None


def evaluation_geometry(size_px: Size, augment: AugmentConfig) -> Geometry:
    """Without chance: the last of the short edges, the long edge within its bound."""
    return _resized(_whole(size_px), augment.short_edge_px[-1], augment.max_edge_px).geometry(flip=False)


def training_geometry(size_px: Size, augment: AugmentConfig, rng: np.random.Generator) -> Geometry:
    """Large-scale jitter where configured, else one of the short edges; then perhaps a crop and a flip."""
    view = _whole(size_px)
    if augment.jitter_scale is not None and augment.crop_px is not None:
        ratio = rng.uniform(*augment.jitter_scale)
        # mmdet truncates here: the edges are whole pixels before the image is fitted into them.
        edges_px = [int(edge * ratio) for edge in augment.crop_px]
        view = _resized(view, min(edges_px), max(edges_px))
    else:
        if augment.crop_first is not None and rng.random() < augment.crop_first.probability:
            view = _cropped_first(view, augment.crop_first, augment.max_edge_px, rng)
        view = _resized(view, _one_of(augment.short_edge_px, rng), augment.max_edge_px)
    if augment.crop_px is not None:
        view = _cropped(view, augment.crop_px, rng)
    return view.geometry(flip=bool(rng.random() < augment.flip_probability))


def apply_geometry(
    sample: Sample, geometry: Geometry, *, recompute_boxes: bool = True, polygons: bool = False
) -> Target:
    """Moves boxes and masks; objects of which nothing is left are left out.

    Args:
        sample: The stored sample.
        geometry: Where it goes.
        recompute_boxes: Where the window cuts an object with a mask, its box becomes that of what remains of the mask
            (mmdet's ``recompute_bbox``), else it is cut itself.
        polygons: Give outlines too, where there are masks.

    Raises:
        DataError: A mask cannot be decoded.
    """
    boxes = geometry.boxes(sample.boxes_xyxy_px)
    shapes = None if sample.segmentations is None else Shapes(sample.segmentations, geometry.window)
    if shapes is not None and recompute_boxes:
        for index in np.flatnonzero(geometry.window.cuts(sample.boxes_xyxy_px)).tolist():
            bounds = shapes.bounds(index)
            boxes[index] = 0 if bounds is None else geometry.boxes(bounds[None])[0]
    kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= MIN_TARGET_PX).all(axis=1))
    masks = None if shapes is None else shapes.mini_masks(kept.tolist(), boxes[kept], geometry)
    outlines = shapes.polygons(kept.tolist(), geometry) if polygons and shapes is not None else None
    return Target(boxes[kept].astype(np.float32), sample.labels[kept], sample.is_crowd[kept], masks, outlines)


@dataclass(frozen=True)
class _View:
    """Resizes and crops so far, as one: sides in fractions of a stored pixel, so that they are rounded only once."""

    left: float
    top: float
    right: float
    bottom: float
    size_px: Size

    def geometry(self, flip: bool) -> Geometry:
        left, right = _whole_pixels(self.left, self.right)
        top, bottom = _whole_pixels(self.top, self.bottom)
        return Geometry(Window(left, top, right, bottom), self.size_px, flip)


def _whole(size_px: Size) -> _View:
    return _View(0.0, 0.0, size_px[1], size_px[0], size_px)


def _resized(view: _View, short_edge_px: int, long_edge_px: int) -> _View:
    """As large as its edges allow."""
    factor = min(long_edge_px / max(view.size_px), short_edge_px / min(view.size_px))
    height, width = (max(1, int(side * factor + 0.5)) for side in view.size_px)
    return replace(view, size_px=(height, width))


def _cropped(view: _View, crop_px: Size, rng: np.random.Generator) -> _View:
    """A random window of the resized image, of the crop's size or what there is."""
    size = min(crop_px[0], view.size_px[0]), min(crop_px[1], view.size_px[1])
    top, left = (int(rng.integers(have - want, endpoint=True)) for have, want in zip(view.size_px, size, strict=True))
    scale_x = view.size_px[1] / (view.right - view.left)
    scale_y = view.size_px[0] / (view.bottom - view.top)
    return _View(
        left=view.left + left / scale_x,
        top=view.top + top / scale_y,
        right=view.left + (left + size[1]) / scale_x,
        bottom=view.top + (top + size[0]) / scale_y,
        size_px=size,
    )


def _cropped_first(view: _View, config: CropFirstConfig, max_edge_px: int, rng: np.random.Generator) -> _View:
    view = _resized(view, _one_of(config.short_edge_px, rng), max_edge_px)
    ranges = ([min(side, end) for end in config.crop_range_px] for side in view.size_px)
    height, width = (int(rng.integers(low, high, endpoint=True)) for low, high in ranges)
    return _cropped(view, (height, width), rng)


def _one_of(sizes_px: tuple[int, ...], rng: np.random.Generator) -> int:
    return sizes_px[int(rng.integers(len(sizes_px)))]


def _whole_pixels(first: float, last: float) -> tuple[int, int]:
    low = int(first) if round(first) >= round(last) else round(first)
    return low, max(round(last), low + 1)
