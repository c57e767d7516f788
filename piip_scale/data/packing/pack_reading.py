"""A sample's files as they are packed: read, decoded once, and held to what is stated of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from piip_scale.data.images import (
    UPRIGHT,
    Image,
    ImageFacts,
    Orientation,
    decode_image,
    image_facts,
    read_file,
    resolve_orientation,
)
from piip_scale.data.packing.label_maps import IGNORED, decode_label_map
from piip_scale.data.packing.pack_plan import LabelMap, PackItem, Reading
from piip_scale.data.sample import check_size
from piip_scale.errors import DataError
from piip_scale.text import printable

# JPEG, TIFF, PNG and WebP keep EXIF data under these names; without one a header need not be read twice.
_EXIF_MARKS = (b"Exif", b"eXIf", b"EXIF", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Checked:
    """A sample that can be packed.

    Attributes:
        content: The image file.
        pixels: What it decodes to, turned; RGB, uint8 (H, W, 3).
        orientation: EXIF's number of how it is turned.
        label_map: The file of a label map; empty where there is none.
        map_orientation: How that is turned.
        pixels_of_class: Of the label map, in label order, those of no class last.
        flaws: What could be overlooked, a line each.
    """

    content: bytes
    pixels: Image
    orientation: int = UPRIGHT
    label_map: bytes = b""
    map_orientation: int = UPRIGHT
    pixels_of_class: tuple[int, ...] = ()
    flaws: tuple[str, ...] = ()


def checked_sample(item: PackItem, reading: Reading) -> Checked:
    """Reads a sample's files.

    Raises:
        DataError: One is absent, damaged, too large, or not of the size that is stated.
    """
    name = printable(f"{item.image_id} ({item.path})")
    content = read_file(item.path)
    flaws: list[str] = []
    orientation = _orientation(content, name, item, reading)
    pixels = decode_image(content, name, orientation=orientation.number, max_pixels=reading.max_pixels, flaws=flaws)
    if item.size_px is not None:
        check_size(pixels, *item.size_px, name)
    lines = [f"image {name} is read in spite of a flaw: {flaw}" for flaw in flaws] + _said(orientation, name)
    if item.label_map is None:
        return Checked(content, pixels, orientation.number, flaws=tuple(lines))
    label_map, turn, counts = _checked_map(item, item.label_map, pixels, orientation, reading)
    return Checked(content, pixels, orientation.number, label_map, turn, counts, tuple(lines))


def add_pixels(total: Sequence[int], more: Sequence[int]) -> list[int]:
    """Sums of two rows of counts, of which the first may be empty."""
    return [a + b for a, b in zip(total, more, strict=True)] if total else list(more)


def _orientation(content: bytes, name: str, item: PackItem, reading: Reading) -> Orientation:
    if not any(mark in content for mark in _EXIF_MARKS):
        return Orientation(UPRIGHT)
    facts = image_facts(content, name, max_pixels=reading.max_pixels)
    return resolve_orientation(facts, reading.exif, item.size_px)


def _said(orientation: Orientation, name: str) -> list[str]:
    if orientation.is_guess:
        return [
            f"image {name} is turned as its EXIF data say ({orientation.number}): are its annotations of that view?"
        ]
    return [f"image {name} is not turned as its EXIF data say"] if orientation.is_left else []


def _checked_map(
    item: PackItem, label_map: LabelMap, pixels: Image, orientation: Orientation, reading: Reading
) -> tuple[bytes, int, tuple[int, ...]]:
    """A label map's file, of the size of its image, how it is turned, and its pixels by class."""
    name = printable(f"{item.image_id} ({label_map.path})")
    content = read_file(label_map.path, "label map")
    facts = image_facts(content, name, max_pixels=reading.max_pixels)
    turn = _map_orientation(facts, pixels.shape[:2])
    labels = decode_label_map(content, label_map.rule, name, turn)
    if labels.shape != pixels.shape[:2]:
        raise DataError(
            f"label map {name} is {labels.shape[1]} x {labels.shape[0]} px",
            rule=f"its image is {pixels.shape[1]} x {pixels.shape[0]}",
        )
    counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)
    of_classes = counts[: label_map.rule.num_classes].tolist()
    return content, turn, (*of_classes, int(counts[IGNORED]))


def _map_orientation(facts: ImageFacts, size_px: tuple[int, ...]) -> int:
    """A label map's own orientation; one of the size of its image as it is stored is left so."""
    return UPRIGHT if facts.stored_size_px == size_px else facts.orientation
