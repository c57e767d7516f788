"""Masks of annotations as COCO writes them, checked before any foreign code sees them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MAX_OUTSIDE = 8.0
"""How far a polygon may stick out, in lengths of the image's long edge: pycocotools walks every pixel of an
outline, and one to 10^9 takes minutes and gigabytes."""

_FIRST_CHARACTER, _NUM_CHARACTERS = 48, 64
_BITS, _MORE, _SIGN = 5, 0x20, 0x10
# Seven characters of five bits hold any run of an image that fits into memory; more would overflow int64.
_MOST_CHARACTERS = 7
_NUMBERS = frozenset({int, float})
# pycocotools counts pixels in 32 bits, and takes memory for all of them without asking whether there is as much.
_MOST_PIXELS = 2**31 - 1


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value read from JSON is a finite number."""
    # An int of hundreds of digits is finite, and no float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def checked_segmentation(value: Any, height_px: int, width_px: int) -> Any:
    """Polygons or compressed run lengths that are safe to draw and to decode; parts that are no polygons are left out.

    Args:
        value: Polygons, or run lengths, compressed or not.
        height_px: Of the image.
        width_px: Of the image.

    Returns:
        The polygons that have an inside, or ``{"size", "counts"}``; ``None`` where the value is empty.

    Raises:
        ValueError: It is neither, or its run lengths do not fill the image.
    """
    if isinstance(value, dict):
        return _checked_runs(value, height_px, width_px)
    if value is None or (isinstance(value, list) and all(part == [] for part in value)):
        return None
    if not isinstance(value, list):
        raise ValueError(f"it is {type(value).__name__}, neither polygons nor run lengths")
    limit = MAX_OUTSIDE * max(height_px, width_px)
    polygons = [part for part in value if _is_polygon(part, limit)]
    if not polygons:
        raise ValueError("none of its polygons has 3 points near the image")
    return polygons


def check_run_lengths(segmentation: Any) -> None:
    """Holds compressed run lengths to their own size.

    pycocotools decodes ones that fall short into memory that nobody wrote, and comparing them never ends: its loop
    waits for pixels that do not come, and no signal reaches it.

    Raises:
        ValueError: They are damaged, or do not fill the image.
    """
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(_is_count(side) and side for side in size)):
        raise ValueError(f"the size of its run lengths is {size!r}")
    if size[0] * size[1] > _MOST_PIXELS:
        raise ValueError(f"the size of its run lengths is {size!r}, beyond any image")
    counts = segmentation.get("counts")
    if not isinstance(counts, str | bytes):
        raise ValueError(f"its run lengths are {type(counts).__name__}, not text")
    _check_sum(run_lengths(counts), int(size[0]), int(size[1]))


def run_lengths(counts: str | bytes) -> Array:
    """The numbers in compressed run lengths, int64 (N,): pixels outside, inside, outside, ... by columns.

    Raises:
        ValueError: The text is damaged.
    """
    try:
        content = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError:
        raise ValueError("its run lengths hold characters that no tool writes") from None
    codes = np.frombuffer(content, np.uint8).astype(np.int64) - _FIRST_CHARACTER
    if not len(codes) or codes.min() < 0 or codes.max() >= _NUM_CHARACTERS or codes[-1] & _MORE:
        raise ValueError("its run lengths are cut off, or hold characters that no tool writes")
    last = np.flatnonzero(codes & _MORE == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > _MOST_CHARACTERS:
        raise ValueError("its run lengths hold a number beyond any image")
    digits = np.arange(len(codes)) - np.repeat(first, lengths)
    values = np.add.reduceat((codes & (_MORE - 1)) << (_BITS * digits), first)
    values -= np.where(codes[last] & _SIGN, np.int64(1) << (_BITS * lengths), 0)
    # From the fourth on each is the difference from the one two before it.
    for parity in (1, 2):
        values[parity::2] = np.cumsum(values[parity::2])
    return values


def box_of(segmentation: Any) -> list[float] | None:
    """The box x, y, width, height around a checked mask, in px; ``None`` where nothing is inside."""
    if isinstance(segmentation, dict):
        from pycocotools import mask as coco_mask

        box = [float(side) for side in coco_mask.toBbox(segmentation)]
    else:
        # Of lists as JSON has them: arrays of so few numbers cost more to make than to search.
        left, top = (min(min(part[axis::2]) for part in segmentation) for axis in (0, 1))
        right, bottom = (max(max(part[axis::2]) for part in segmentation) for axis in (0, 1))
        box = [float(side) for side in (left, top, right - left, bottom - top)]
    return box if min(box[2:]) > 0 else None


def reaches_into(segmentation: Any, box_xywh_px: Sequence[float]) -> bool:
    """Whether the box around a checked mask overlaps another; pixels are not looked at."""
    own = box_of(segmentation)
    if own is None:
        return False
    return all(
        min(own[axis] + own[axis + 2], box_xywh_px[axis] + box_xywh_px[axis + 2]) > max(own[axis], box_xywh_px[axis])
        for axis in (0, 1)
    )


def mask_columns(segmentation: Any, begin: int, end: int) -> Array:
    """Some columns of a checked mask of compressed run lengths, 0 and 1, uint8 (end - begin, H)."""
    height = int(segmentation["size"][0])
    edges = np.cumsum(run_lengths(segmentation["counts"])).clip(begin * height, end * height)
    lengths = np.diff(edges, prepend=begin * height)
    columns = np.repeat(np.arange(len(lengths), dtype=np.uint8) & 1, lengths)
    return columns.reshape(end - begin, height)


def _checked_runs(value: dict[str, Any], height_px: int, width_px: int) -> dict[str, Any]:
    size, counts = value.get("size"), value.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and size == [height_px, width_px]):
        raise ValueError(f"its run lengths are of size {size!r}, the image of [{height_px}, {width_px}]")
    size = [height_px, width_px]
    if isinstance(counts, list):
        return {"size": size, "counts": _compressed(counts, height_px, width_px)}
    checked = {"size": size, "counts": counts}
    check_run_lengths(checked)
    return checked


def compressed_runs(counts: Sequence[int] | Array, height_px: int, width_px: int) -> str:
    """Run lengths that fill an image as COCO's text: pixels outside, inside, outside, ... by columns."""
    from pycocotools import mask as coco_mask

    packed = coco_mask.frPyObjects({"size": [height_px, width_px], "counts": counts}, height_px, width_px)
    return str(packed["counts"].decode("ascii"))


def _compressed(counts: list[Any], height_px: int, width_px: int) -> str:
    if not all(_is_count(count) for count in counts):
        raise ValueError("its run lengths are not whole numbers from 0")
    numbers = [int(count) for count in counts]
    if sum(numbers) != height_px * width_px:
        raise ValueError(f"its run lengths add up to {sum(numbers)} px, the image has {height_px * width_px}")
    return compressed_runs(numbers, height_px, width_px)


def _check_sum(numbers: Array, height_px: int, width_px: int) -> None:
    if numbers.min() < 0:
        raise ValueError("its run lengths hold a number below 0")
    # Each is below 2^35, so that of fewer than 2^28 the sum is exact.
    if len(numbers) > height_px * width_px + 1 or int(numbers.sum()) != height_px * width_px:
        raise ValueError(f"its run lengths add up to {int(numbers.sum())} px, the image has {height_px * width_px}")


def _is_count(value: object) -> bool:
    return is_number(value) and value >= 0 and math.floor(value) == value


def _is_polygon(value: object, limit: float) -> bool:
    if not isinstance(value, list) or len(value) < 6 or len(value) % 2:
        return False
    # By types and bounds at once: a large set has some ten million of these numbers.
    if not _NUMBERS.issuperset(map(type, value)):
        return False
    # A number that is none hides from comparisons, and not from the sum.
    return -limit <= min(value) and max(value) <= limit and math.isfinite(sum(value))
