"""Instance masks as the loader carries them: anti-aliased, cut to the object's box, of one fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from piip_scale.data.augment.coverage import draw_covered
from piip_scale.data.augment.geometry import Geometry, Window
from piip_scale.data.batch import MASK_SIZE_PX
from piip_scale.data.reading.mask_checks import check_run_lengths
from piip_scale.errors import DataError

Array = npt.NDArray[Any]

_MAX_BITMAP_SUPERSAMPLING = 4
_TRACE_SUPERSAMPLING = 4
_INSIDE = 255
_MOST_PX = 2**31 - 1


class Shapes:
    """The masks of a sample inside a window of the stored image; polygons are cut to it, all in one row of points.

    Args:
        segmentations: Polygons or run lengths of each object, in pixels of the stored image.
        window: What is seen of them.
    """

    def __init__(self, segmentations: Sequence[Any], window: Window) -> None:
        self._window = window
        self._run_lengths = {i: value for i, value in enumerate(segmentations) if isinstance(value, dict)}
        outlines = [(i, o) for i, value in enumerate(segmentations) if i not in self._run_lengths for o in value]
        self._owners = np.array([owner for owner, _ in outlines], np.int64)
        self._lengths = np.array([len(outline) // 2 for _, outline in outlines], np.int64)
        self._points_xy = _points_of([value for _, outline in outlines for value in outline])
        self._cut_outlines()

    def _cut_outlines(self) -> None:
        if not len(self._owners):
            return
        starts = np.cumsum(self._lengths) - self._lengths
        low, high = (f.reduceat(self._points_xy, starts) for f in (np.minimum, np.maximum))
        cut = self._window.cuts(np.concatenate([low, high], axis=1))
        if cut.any():
            outlines = np.split(self._points_xy, starts[1:])
            for number in np.flatnonzero(cut):
                outlines[number] = clip_polygon(outlines[number], self._window)
            self._points_xy = np.concatenate(outlines)
            self._lengths = np.array([len(outline) for outline in outlines], np.int64)

    def bounds(self, index: int) -> Array | None:
        """The box of what an object's mask shows, float64 (4,), in the stored image; ``None`` where that is nothing.

        Raises:
            DataError: The run lengths cannot be decoded.
        """
        if index in self._run_lengths:
            return _bitmap_bounds(decode_run_lengths(self._run_lengths[index]), self._window)
        points = self._points_xy[np.repeat(self._owners == index, self._lengths)]
        return np.concatenate([points.min(axis=0), points.max(axis=0)]) if len(points) else None

    def mini_masks(self, indices: Sequence[int], boxes_xyxy_px: Array, geometry: Geometry) -> Array:
        """Masks of some objects inside their boxes of the new image, uint8 (N, MASK_SIZE_PX, MASK_SIZE_PX), 255 inside.

        Args:
            indices: Which objects.
            boxes_xyxy_px: Their boxes in the new image, float64 (N, 4).
            geometry: From the stored image to the new one.

        Raises:
            DataError: Run lengths cannot be decoded, or polygons not be drawn.
        """
        masks = np.zeros((len(indices), MASK_SIZE_PX, MASK_SIZE_PX), np.uint8)
        self._draw_polygons(indices, boxes_xyxy_px, geometry, masks)
        for mask, index, box_xyxy_px in zip(masks, indices, boxes_xyxy_px, strict=True):
            if index in self._run_lengths:
                _sample_bitmap(decode_run_lengths(self._run_lengths[index]), box_xyxy_px, geometry, mask)
        return masks

    def polygons(self, indices: Sequence[int], geometry: Geometry) -> list[list[Array]]:
        """Outlines of some objects in the new image, float64 (M, 2) each; run lengths are traced around, holes filled.

        Args:
            indices: Which objects.
            geometry: From the stored image to the new one.

        Raises:
            DataError: The run lengths cannot be decoded.
        """
        found: dict[int, list[Array]] = {index: [] for index in indices}
        parts = np.split(self._points_xy, np.cumsum(self._lengths)[:-1]) if len(self._lengths) else []
        for owner, part in zip(self._owners.tolist(), parts, strict=True):
            if owner in found and len(part):
                found[owner].append(geometry.points(part))
        for index in found.keys() & self._run_lengths.keys():
            outlines = traced(decode_run_lengths(self._run_lengths[index]), self._window)
            found[index] = [geometry.points(outline) for outline in outlines]
        return list(found.values())

    def _draw_polygons(self, indices: Sequence[int], boxes_xyxy_px: Array, geometry: Geometry, masks: Array) -> None:
        """One map for all points, into cells of the masks over their boxes."""
        places = {index: place for place, index in enumerate(indices)}
        positions_of_all = np.array([places.get(owner, -1) for owner in self._owners.tolist()], np.int64)
        wanted = positions_of_all >= 0
        owners, lengths = positions_of_all[wanted], self._lengths[wanted]
        boxes = boxes_xyxy_px[owners]
        cells_per_px = MASK_SIZE_PX / (boxes[:, 2:] - boxes[:, :2])
        points = geometry.points(self._points_xy[np.repeat(wanted, self._lengths)])
        points = (points - boxes[:, :2].repeat(lengths, 0)) * cells_per_px.repeat(lengths, 0)
        draw_covered(points, lengths, owners, masks)


def _points_of(values: Sequence[Any]) -> Array:
    """Points x, y in a row as float64 (N, 2).

    Raises:
        DataError: They are no numbers, or of no place near an image: drawing walks along each edge.
    """
    try:
        points_xy = np.array(values, np.float64).reshape(-1, 2)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError("a polygon holds what is no number", value=str(error), fix="pack the set again") from None
    # Of NaN neither is true.
    if not (np.abs(points_xy) <= _MOST_PX).all():
        raise DataError("a polygon reaches further than any image", rule=f"within {_MOST_PX} px", fix="pack it again")
    return points_xy


def decode_run_lengths(segmentation: dict[str, Any]) -> Array:
    """A bitmap of the stored image's size, uint8 (H, W), 1 inside.

    Raises:
        DataError: The run lengths are damaged.
    """
    from pycocotools import mask as coco_mask

    try:
        check_run_lengths(segmentation)
        return np.asarray(coco_mask.decode(segmentation))
    except (ValueError, TypeError) as error:
        raise DataError("run lengths cannot be decoded", value=str(error), fix="correct or remove the mask") from None


def traced(bitmap: Array, window: Window) -> list[Array]:
    """Outer borders of what a bitmap shows inside a window, float64 (M, 2) each, in pixels of the stored image."""
    bounds = _bitmap_bounds(bitmap, window)
    if bounds is None:
        return []
    left, top, right, bottom = bounds.astype(int).tolist()
    part = bitmap[top:bottom, left:right].repeat(_TRACE_SUPERSAMPLING, 0).repeat(_TRACE_SUPERSAMPLING, 1)
    # cv2 follows the centres of the outermost pixels, half a pixel inside the border: of finer ones that is little.
    outlines, _ = cv2.findContours(np.ascontiguousarray(part), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    points = [(np.asarray(outline, np.float64)[:, 0] + 0.5) / _TRACE_SUPERSAMPLING for outline in outlines]
    corner = np.array([left, top], np.float64)
    return [outline + corner for outline in points if len(outline) > 2]


def clip_polygon(points_xy: Array, window: Window) -> Array:
    """A polygon cut to a window, float64 (M, 2), where M may be 0.

    Source: Sutherland and Hodgman, 1974. Parts of a concave polygon stay joined along the window's border.
    """
    for axis, border, sign in ((0, window.left, 1), (0, window.right, -1), (1, window.top, 1), (1, window.bottom, -1)):
        if len(points_xy):
            points_xy = _cut_by_line(points_xy, axis, border, sign)
    return points_xy


def _cut_by_line(points_xy: Array, axis: int, border: float, sign: int) -> Array:
    depth = sign * (points_xy[:, axis] - border)
    if depth.min() >= 0:
        return points_xy
    following, next_depth = (np.concatenate([of[1:], of[:1]]) for of in (points_xy, depth))
    crosses = (depth >= 0) != (next_depth >= 0)
    share = np.where(crosses, depth / np.where(crosses, depth - next_depth, 1.0), 0.0)
    crossings = points_xy + share[:, None] * (following - points_xy)
    crossings[:, axis] = border
    # Each corner is followed by the crossing on its edge; what is not there is left out.
    both = np.stack([points_xy, crossings], axis=1).reshape(-1, 2)
    return np.asarray(both[np.stack([depth >= 0, crosses], axis=1).ravel()])


def _bitmap_bounds(bitmap: Array, window: Window) -> Array | None:
    part = bitmap[window.top : window.bottom, window.left : window.right]
    left, top, width, height = cv2.boundingRect(np.ascontiguousarray(part))
    if not width:
        return None
    left, top = left + window.left, top + window.top
    return np.array([left, top, left + width, top + height], np.float64)


def _sample_bitmap(bitmap: Array, box_xyxy_px: Array, geometry: Geometry, into: Array) -> None:
    """Samples a bitmap of the stored image on a grid over the box, finer where the box is large."""
    corners = geometry.stored_points(box_xyxy_px.reshape(2, 2))
    extent = np.abs(corners[1] - corners[0])
    factor = int(np.clip(np.ceil(extent.max() / MASK_SIZE_PX), 1, _MAX_BITMAP_SUPERSAMPLING))
    side = MASK_SIZE_PX * factor
    step = (corners[1] - corners[0]) / side
    first = corners[0] + step / 2 - 0.5
    back = np.array([[step[0], 0, first[0]], [0, step[1], first[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    grid = cv2.warpAffine(bitmap * np.uint8(_INSIDE), back, (side, side), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    cv2.resize(grid, (MASK_SIZE_PX, MASK_SIZE_PX), dst=into, interpolation=cv2.INTER_AREA)
