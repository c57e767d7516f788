"""Which share of each cell of a grid polygons cover, exactly: FreeType's rasteriser of letters draws masks."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import byref, pointer
from typing import Any

import numpy as np
import numpy.typing as npt
from freetype import raw as freetype

from piip_scale.errors import DataError

Array = npt.NDArray[Any]

# FreeType counts in parts of a cell, refuses coordinates from 2**24 of them on, and counts corners in 16 bits.
_PARTS = 64
_MAX_PARTS = 2**24 - 1
_MAX_CORNERS = 2**15 - 1
_ON_OUTLINE = 1
_NUM_GRAYS, _GRAY_PIXELS = 256, 2


def draw_covered(points_xy: Array, lengths: Array, owners: Array, masks: Array) -> None:
    """Writes which share of every cell of their masks polygons cover, 255 for all of it.

    Args:
        points_xy: Corners of all polygons in turn, float64 (P, 2), x and y in cells; parts outside the grid cover
            nothing. Of a mask with more corners than FreeType takes, 32 thousand, every second, third or so is drawn.
        lengths: Corners of each polygon, int64 (K,); those of none cover nothing.
        owners: The mask that each belongs to, int64 (K,), those of one mask in turn. Where two of them overlap, a
            cell's share is that of both, at most all of it.
        masks: Zeros, uint8 (N, side, side), contiguous.

    Raises:
        DataError: A corner is not a finite number, or a mask has more polygons than FreeType takes.

    Source: FreeType's smooth rasteriser, which adds up signed areas as accurate as its coordinates, 1/64 of a cell.
    """
    points_xy, lengths, owners = _few_enough(points_xy, lengths[lengths > 0], owners[lengths > 0])
    if not np.isfinite(points_xy).all():
        raise DataError("a polygon has a corner that is no finite number", fix="correct or remove the mask")
    if not len(lengths):
        return
    # FreeType's y points upwards.
    parts = np.rint(points_xy * (_PARTS, -_PARTS) + (0, masks.shape[-1] * _PARTS))
    corners = np.clip(parts, -_MAX_PARTS, _MAX_PARTS).astype(ctypes.c_long)
    _turn_alike(corners, lengths, owners)
    _draw_all(corners, lengths, owners, masks)


def _draw_all(corners: Array, lengths: Array, owners: Array, masks: Array) -> None:
    # By addresses that are computed at once: to slice arrays and ask for theirs takes longer than to draw a mask.
    tags = np.full(len(corners), _ON_OUTLINE, np.uint8)
    first_polygons = np.flatnonzero(np.diff(owners, prepend=-1))
    num_polygons = np.diff(first_polygons, append=len(owners))
    stops = np.cumsum(lengths)
    first_corners = (stops - lengths)[first_polygons]
    last_corners = (stops - 1 - first_corners.repeat(num_polygons)).astype(ctypes.c_short)
    counts = num_polygons, np.diff(first_corners, append=len(corners))
    rows = (
        (corners, first_corners),
        (tags, first_corners),
        (last_corners, first_polygons),
        (masks, owners[first_polygons]),
    )
    addresses = [of.ctypes.data + of.strides[0] * number for of, number in rows]
    for arguments in np.stack([*counts, *addresses], axis=1).tolist():
        _draw(arguments, masks.shape[-1])


def _few_enough(points_xy: Array, lengths: Array, owners: Array) -> tuple[Array, Array, Array]:
    """As they are, but for masks of too many corners."""
    totals = np.bincount(owners, lengths)
    if totals.max(initial=0) <= _MAX_CORNERS:
        return points_xy, lengths, owners
    steps = np.ceil(2 * totals / _MAX_CORNERS).astype(np.int64)[owners]
    positions = np.arange(len(points_xy)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return points_xy[positions % np.repeat(steps, lengths) == 0], -(-lengths // steps), owners


def _turn_alike(corners: Array, lengths: Array, owners: Array) -> None:
    """Turns the polygons of a mask of several one way: where others overlap, they would take from each other."""
    of_several = np.bincount(owners)[owners] > 1
    for stop, length in zip(np.cumsum(lengths)[of_several].tolist(), lengths[of_several].tolist(), strict=True):
        polygon = corners[stop - length : stop]
        x, y = polygon.astype(np.float64).T
        # Twice the area, of all triangles with the last corner.
        if np.dot(x[:-1] - x[-1], y[1:] - y[-1]) < np.dot(x[1:] - x[-1], y[:-1] - y[-1]):
            polygon[:] = polygon[::-1].copy()


def _draw(arguments: Sequence[int], side: int) -> None:
    """Draws one mask; ``arguments``: numbers of polygons and corners, and the addresses of their data and the mask."""
    num_polygons, num_corners, corners, tags, last_corners, mask = arguments
    outline = freetype.FT_Outline(
        num_polygons,
        num_corners,
        pointer(freetype.FT_Vector.from_address(corners)),
        pointer(ctypes.c_ubyte.from_address(tags)),
        pointer(ctypes.c_short.from_address(last_corners)),
    )
    bitmap = freetype.FT_Bitmap(side, side, side, pointer(ctypes.c_ubyte.from_address(mask)), _NUM_GRAYS, _GRAY_PIXELS)
    # More would wrap around in 16 bits, and nothing be drawn.
    fits = num_corners <= _MAX_CORNERS
    if not fits or freetype.FT_Outline_Get_Bitmap(_library(), byref(outline), byref(bitmap)):
        raise DataError(
            "a mask cannot be drawn",
            value=f"{num_polygons} polygons, {num_corners} corners",
            rule=f"FreeType takes {_MAX_CORNERS}",
            fix="remove the mask, or give it as run lengths",
        )


@functools.cache
def _library() -> Any:
    library = freetype.FT_Library()
    freetype.FT_Init_FreeType(byref(library))
    return library
