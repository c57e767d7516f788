"""What the bytes of a sample decode to: an image and what is on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from piip_scale.data.images import MAX_PIXELS, Image, decode_image
from piip_scale.data.reading.raw import RawSample, check_bytes, mask_error, parse_notes
from piip_scale.errors import DataError

MIN_BOX_PX = 1.0
"""Boxes of fewer pixels in the stored image are no training targets (mmdet's ``CocoDataset`` leaves them out too)."""

Array = npt.NDArray[Any]


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
    for note in kept if has_masks else ():
        if isinstance(mask := note["segmentation"], dict) and mask["size"] != list(pixels.shape[:2]):
            raise mask_error(raw.key, note, f"it is of size {mask['size']!r:.40}, the image of {pixels.shape[:2]}")
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
