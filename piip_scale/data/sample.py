"""One sample as it lies in a shard: an image file and its annotations, and what they decode to."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from piip_scale.errors import DataError

MIN_BOX_PX = 1.0
"""Boxes of fewer pixels in the stored image are no training targets (mmdet's ``CocoDataset`` leaves them out too)."""

Image = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]

SetKind = Literal["detection", "classification", "segmentation"]
"""What a packed set's samples are labelled with, by the task that trains on it."""

_IN_NOTES: dict[SetKind, frozenset[str]] = {
    "detection": frozenset({"image_id", "file_name", "height", "width", "annotations"}),
    "classification": frozenset({"image_id", "file_name", "label"}),
    "segmentation": frozenset({"image_id", "file_name"}),
}


@dataclass(frozen=True)
class RawSample:
    """A sample's bytes.

    Attributes:
        image: The image file, as it was packed.
        notes: JSON: ``image_id`` and ``file_name``; for detection ``height, width, annotations``, the last as in COCO;
            for classification ``label``.
        crc32: Of ``image``, ``notes`` and ``label_map`` in this order, when they were packed.
        label_map: The file of a segmentation set's label map, as it was packed; empty in other sets.
    """

    key: str
    image: bytes
    notes: bytes
    crc32: int
    label_map: bytes = b""


@dataclass(frozen=True)
class Sample:
    """A decoded sample, in pixels of the stored image.

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
    pixels = decode_image(raw.image, raw.key)
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
    return LabelledImage(raw.key, notes["image_id"], decode_image(raw.image, raw.key), label)


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
    missing = _IN_NOTES[kind] - set(notes)
    if missing:
        raise DataError(f"annotations of sample {raw.key} lack {sorted(missing)}", fix="pack the set again")
    return notes


def decode_image(content: bytes, name: str) -> Image:
    """Decodes a JPEG, or any other format that Pillow reads, to RGB, uint8 (H, W, 3).

    EXIF rotation is not applied: COCO's boxes are in stored pixels.

    Raises:
        DataError: The image is truncated, damaged, or not an image.
    """
    try:
        if content[:2] == b"\xff\xd8":
            return _decode_jpeg(content)
        return _decode_other(content)
    # Pillow's decoders raise any of these for damaged files; simplejpeg raises ValueError.
    except (ValueError, OSError, SyntaxError, EOFError, IndexError, struct.error) as error:
        raise DataError(
            f"image {name} cannot be decoded",
            value=str(error).strip(),
            rule="it must be a whole image of 8 bits a channel",
            fix="replace the file, or remove its entry",
        ) from error


def _decode_jpeg(content: bytes) -> Image:
    import simplejpeg

    return np.asarray(simplejpeg.decode_jpeg(content, "RGB"))


def _decode_other(content: bytes) -> Image:
    import PIL.Image

    try:
        image = PIL.Image.open(io.BytesIO(content))
    # Pillow's own texts name an object of Python's, and a bomb is an error of no kind that others are.
    except PIL.UnidentifiedImageError:
        raise ValueError(f"{len(content)} bytes in no format that Pillow reads") from None
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    with image:
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
            raise ValueError(f"its pixels are of mode {image.mode}, not 8-bit")
        return np.asarray(image.convert("RGB"))


def check_size(pixels: Image, height_px: int, width_px: int, name: str) -> None:
    """Holds an image to the size its annotations state.

    Raises:
        DataError: It has another one.
    """
    if pixels.shape[:2] != (height_px, width_px):
        raise DataError(
            f"image {name} is {pixels.shape[1]} x {pixels.shape[0]} px",
            rule=f"its annotations say {width_px} x {height_px}",
            fix="correct the entry (an EXIF rotation is not applied: sizes are of the stored pixels)",
        )


def _corners(boxes_xywh: Sequence[Sequence[float]]) -> Array:
    boxes = np.array(boxes_xywh, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
