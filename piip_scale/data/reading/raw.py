"""One sample as it lies in a shard: the bytes of its files, and the annotations among them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from piip_scale.data.orientation import UPRIGHT
from piip_scale.data.reading.mask_checks import checked_segmentation
from piip_scale.data.set_kinds import SET_KINDS
from piip_scale.errors import DataError
from piip_scale.registry import SetKind

_IN_ANNOTATION = frozenset({"id", "category_id", "bbox", "area", "iscrowd"})
_MOST_PX = 2**31 - 1
_LARGEST_NUMBER = 1e300


class UnreadableSample(DataError):
    """One sample's files cannot be read, and those of the rest of its set can."""


@dataclass(frozen=True)
class RawSample:
    """A sample's bytes.

    Attributes:
        image: The image file, as it was packed.
        notes: JSON: ``image_id`` and ``file_name``; for detection ``height, width, annotations``, the last as in COCO;
            for classification ``label``.
        crc32: Of ``image``, ``notes`` and ``label_map`` in this order, when they were packed.
        label_map: The file of a segmentation set's label map, as it was packed; empty in other sets.
        orientation: EXIF's number of how the image's stored pixels are turned, as packing decided.
        map_orientation: Likewise of the label map.
        size_px: Height and width of the image in the index; a file of more pixels is not decoded.
    """

    key: str
    image: bytes
    notes: bytes
    crc32: int
    label_map: bytes = b""
    orientation: int = UPRIGHT
    map_orientation: int = UPRIGHT
    size_px: tuple[int, int] | None = None


def checksum(image: bytes, notes: bytes, label_map: bytes = b"") -> int:
    """The CRC-32 of a sample's bytes."""
    return zlib.crc32(label_map, zlib.crc32(notes, zlib.crc32(image)))


def check_bytes(raw: RawSample) -> None:
    """Holds a sample to its checksum.

    Raises:
        DataError: Its bytes changed since they were packed.
    """
    if checksum(raw.image, raw.notes, raw.label_map) != raw.crc32:
        raise DataError(f"sample {raw.key} changed since it was packed", rule="its checksum must match")


def parse_notes(raw: RawSample, kind: SetKind = "detection") -> dict[str, Any]:
    """A sample's annotations.

    Args:
        raw: The sample; its image is not looked at.
        kind: Of its set.

    Raises:
        DataError: They are not the JSON that packing writes.
    """
    try:
        notes = json.loads(raw.notes)
    # Python's own limits too: a number of thousands of digits, lists in lists without end.
    except (ValueError, RecursionError) as error:
        raise DataError(f"annotations of sample {raw.key} cannot be read", value=str(error)) from None
    missing = SET_KINDS[kind].notes - (notes.keys() if isinstance(notes, dict) else set())
    if missing:
        raise DataError(f"annotations of sample {raw.key} lack {sorted(missing)}", fix="pack the set again")
    if "label" in notes and not _is_whole(notes["label"]):
        raise DataError(f"label of sample {raw.key}", value=notes["label"], rule="it is a whole number")
    if problem := next(filter(None, _wrong_notes(notes)), ""):
        raise DataError(f"annotations of sample {raw.key} hold {problem}", fix="pack the set again")
    checked: dict[str, Any] = notes
    return checked


def checked_masks(notes: dict[str, Any], name: str) -> dict[str, Any]:
    """Annotations whose masks foreign code may draw, decode and compare: it checks nothing itself, and can hang.

    Raises:
        DataError: A mask is none, or none of this image.
    """
    for annotation in notes.get("annotations", []):
        if "segmentation" in annotation:
            try:
                mask = checked_segmentation(annotation["segmentation"], notes["height"], notes["width"])
            except ValueError as error:
                raise mask_error(name, annotation, str(error)) from None
            if mask is None:
                raise mask_error(name, annotation, "it is empty")
            annotation["segmentation"] = mask
    return notes


def mask_error(name: str, annotation: dict[str, Any], reason: str) -> DataError:
    """What is wrong with the mask of an annotation of a sample."""
    return DataError(f"mask of annotation {annotation['id']} of sample {name}", value=reason, fix="pack the set again")


def _wrong_notes(notes: dict[str, Any]) -> Iterator[str]:
    """What packing does not write: a set from elsewhere may hold anything, and it goes into arrays and foreign code."""
    for side in ("height", "width"):
        if side in notes and not (_is_whole(notes[side]) and 0 < notes[side] <= _MOST_PX):
            yield f"{side} {notes[side]!r:.40}"
    if not _is_whole(notes["image_id"]) or not isinstance(notes["file_name"], str):
        yield f"image_id {notes['image_id']!r:.40}, file_name {notes['file_name']!r:.40}"
    annotations = notes.get("annotations", [])
    if not isinstance(annotations, list):
        yield f"annotations that are {type(annotations).__name__}"
        return
    for number, annotation in enumerate(annotations):
        if not _is_annotation(annotation):
            yield f"annotation {number}, {annotation!r:.80}"


def _is_annotation(value: object) -> bool:
    if not isinstance(value, dict) or not value.keys() >= _IN_ANNOTATION:
        return False
    box = value["bbox"]
    return (
        _is_whole(value["category_id"])
        and value["iscrowd"] in (0, 1)
        and isinstance(box, list)
        and len(box) == 4
        and all(_is_number(side) and abs(side) <= _MOST_PX for side in box)
        and _is_number(value["area"])
        and _is_whole(value["id"])
        and _has_shape_of_mask(value.get("segmentation", []))
    )


def _has_shape_of_mask(value: object) -> bool:
    """Polygons of whole points, or run lengths; their numbers are looked at where they are decoded, all at once."""
    if isinstance(value, dict):
        return isinstance(value.get("counts"), str) and isinstance(value.get("size"), list)
    return isinstance(value, list) and all(
        isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in value
    )


def _is_whole(value: object) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_number(value: object) -> bool:
    # Neither NaN nor infinity, which Python's reader of JSON takes, is below a bound.
    return isinstance(value, int | float) and abs(value) < _LARGEST_NUMBER
