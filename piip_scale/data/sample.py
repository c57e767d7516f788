"""One sample as it lies in a shard: an image file and its annotations, and what they decode to."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from piip_scale.data.images import MAX_PIXELS, UPRIGHT
from piip_scale.data.images import Image as Image
from piip_scale.data.images import decode_image as decode_image
from piip_scale.data.set_kinds import SET_KINDS
from piip_scale.errors import DataError
from piip_scale.registry import SetKind as SetKind

MIN_BOX_PX = 1.0
"""Boxes of fewer pixels in the stored image are no training targets (mmdet's ``CocoDataset`` leaves them out too)."""

Array = npt.NDArray[Any]


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


@dataclass(frozen=True)
class Sample:
    """A decoded sample, in pixels of its image.

    Attributes:
        pixels: RGB, uint8 (H, W, 3).
        boxes_xyxy_px: float64 (N, 4).
        labels: int64 (N,).
        is_crowd: bool (N,).
        segmentations: Polygons or run lengths, one per object; ``None`` for a set without masks.
    """

    key: str
    image_id: int
    pixels: Image
    boxes_xyxy_px: Array
    labels: Array
    is_crowd: Array
    segmentations: tuple[Any, ...] | None


@dataclass(frozen=True)
class LabelledImage:
    """A decoded sample of a classification set.

    Attributes:
        pixels: RGB, uint8 (H, W, 3).
        label: Index of its class.
    """

    key: str
    image_id: int
    pixels: Image
    label: int


def checksum(image: bytes, notes: bytes, label_map: bytes = b"") -> int:
    """The CRC-32 of a sample's bytes."""
    return zlib.crc32(label_map, zlib.crc32(notes, zlib.crc32(image)))


def decode_sample(raw: RawSample, label_of_category: Mapping[int, int], *, has_masks: bool) -> Sample:
    """Decodes a sample; boxes too small to be a target are left out.

    Raises:
        DataError: The bytes changed since they were packed, or the image or an annotation cannot be read.
    """
    check_bytes(raw)
    notes = parse_notes(raw)
    pixels = decode_pixels(raw)
    check_size(pixels, notes["height"], notes["width"], raw.key)
    kept = [note for note in notes["annotations"] if min(note["bbox"][2:]) >= MIN_BOX_PX]
    try:
        labels = [label_of_category[note["category_id"]] for note in kept]
        segmentations = tuple(note["segmentation"] for note in kept) if has_masks else None
    except KeyError as error:
        raise DataError(
            f"annotation of sample {raw.key}", value=error.args[0], rule="not what the manifest says"
        ) from None
    return Sample(
        raw.key,
        notes["image_id"],
        pixels,
        _corners([note["bbox"] for note in kept]),
        np.array(labels, np.int64),
        np.array([bool(note["iscrowd"]) for note in kept], bool),
        segmentations,
    )


def decode_labelled(raw: RawSample, num_classes: int) -> LabelledImage:
    """Decodes a sample of a classification set.

    Raises:
        DataError: The bytes changed since they were packed, or the image or its label cannot be used.
    """
    check_bytes(raw)
    notes = parse_notes(raw, "classification")
    label = notes["label"]
    if not isinstance(label, int) or not 0 <= label < num_classes:
        raise DataError(
            f"label of sample {raw.key}", value=label, rule=f"the manifest names classes 0-{num_classes - 1}"
        )
    return LabelledImage(raw.key, notes["image_id"], decode_pixels(raw), label)


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
        notes: dict[str, Any] = json.loads(raw.notes)
    except ValueError as error:
        raise DataError(f"annotations of sample {raw.key} cannot be read", value=str(error)) from None
    missing = SET_KINDS[kind].notes - set(notes)
    if missing:
        raise DataError(f"annotations of sample {raw.key} lack {sorted(missing)}", fix="pack the set again")
    return notes


def decode_pixels(raw: RawSample) -> Image:
    """A sample's image as it was packed: RGB, uint8 (H, W, 3), turned where packing decided so.

    Raises:
        DataError: The image is damaged, or larger than its index says.
    """
    max_pixels = MAX_PIXELS if raw.size_px is None else raw.size_px[0] * raw.size_px[1]
    return decode_image(raw.image, raw.key, orientation=raw.orientation, max_pixels=max_pixels)


def check_size(pixels: Image, height_px: int, width_px: int, name: str) -> None:
    """Holds an image to the size its annotations state.

    Raises:
        DataError: It has another one.
    """
    if pixels.shape[:2] != (height_px, width_px):
        raise DataError(
            f"image {name} is {pixels.shape[1]} x {pixels.shape[0]} px",
            rule=f"its annotations say {width_px} x {height_px}",
            fix="correct the entry (--exif says whether an orientation in the file is applied)",
        )


def _corners(boxes_xywh: Sequence[Sequence[float]]) -> Array:
    boxes = np.array(boxes_xywh, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
