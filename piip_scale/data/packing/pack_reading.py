"""A sample's files as they are packed: read, decoded once, and held to what is stated of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from piip_scale.data.images import Image, decode_image, image_facts, may_be_turned, read_file
from piip_scale.data.orientation import UPRIGHT, ImageFacts, Orientation, oriented_size, resolve_orientation
from piip_scale.data.packing.pack_plan import LabelMap, PackItem, Reading
from piip_scale.data.reading.decoding import check_size
from piip_scale.data.reading.label_maps import IGNORED, decode_label_map
from piip_scale.data.reading.manifest import MapRule
from piip_scale.data.reading.raw import RawSample, checksum
from piip_scale.errors import DataError
from piip_scale.text import printable


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
    label_map = _map_file(item, item.label_map, reading) if item.label_map is not None else None
    content = read_file(item.path)
    flaws: list[str] = []
    # A label map states the size of the view that it was drawn on, as annotations do.
    stated = item.size_px if label_map is None else label_map.facts.stored_size_px
    orientation = _orientation(content, name, stated, reading)
    pixels = decode_image(content, name, orientation=orientation.number, max_pixels=reading.max_pixels, flaws=flaws)
    if item.size_px is not None:
        check_size(pixels, *item.size_px, name)
    lines = [f"image {name} is read in spite of a flaw: {flaw}" for flaw in flaws] + _notices(orientation, name)
    if label_map is None:
        return Checked(content, pixels, orientation.number, flaws=tuple(lines))
    turn, counts = _checked_map(label_map, pixels, reading)
    return Checked(content, pixels, orientation.number, label_map.content, turn, counts, tuple(lines))


def raw_sample(item: PackItem, reading: Reading) -> RawSample:
    """A sample's files as a shard would hold them; the image is not decoded, and only its reader sees that it is whole.

    Raises:
        DataError: One is absent, too large, or of another size than the other.
    """
    name = printable(f"{item.image_id} ({item.path})")
    label_map = _map_file(item, item.label_map, reading) if item.label_map is not None else None
    content = read_file(item.path)
    stated = item.size_px if label_map is None else label_map.facts.stored_size_px
    turn = _orientation(content, name, stated, reading).number
    size_px = item.size_px
    if size_px is None:
        facts = image_facts(content, name, max_pixels=reading.max_pixels)
        size_px = oriented_size(facts.stored_size_px, turn)
    map_bytes, map_turn = (b"", UPRIGHT) if label_map is None else (label_map.content, _map_turn(label_map, size_px))
    crc32 = checksum(content, item.notes, map_bytes)
    return RawSample(item.key, content, item.notes, crc32, map_bytes, turn, map_turn, size_px)


def add_pixels(total: Sequence[int], more: Sequence[int]) -> list[int]:
    """Sums of two rows of counts, of which the first may be empty."""
    return [a + b for a, b in zip(total, more, strict=True)] if total else list(more)


def _orientation(content: bytes, name: str, size_px: tuple[int, int] | None, reading: Reading) -> Orientation:
    # Most have none, and reading their headers twice takes longer than to look.
    if not may_be_turned(content):
        return Orientation(UPRIGHT)
    facts = image_facts(content, name, max_pixels=reading.max_pixels)
    return resolve_orientation(facts, reading.exif, size_px, reading.undecided)


def _notices(orientation: Orientation, name: str) -> list[str]:
    if orientation.is_guess:
        number = orientation.number
        return [f"image {name} is turned by its EXIF orientation {number}: are its annotations of that view?"]
    return [f"image {name} is not turned, in spite of its EXIF orientation"] if orientation.is_left else []


@dataclass(frozen=True)
class _MapFile:
    """A label map's file, of which only the header was read."""

    name: str
    content: bytes
    facts: ImageFacts
    rule: MapRule


def _map_file(item: PackItem, label_map: LabelMap, reading: Reading) -> _MapFile:
    name = printable(f"{item.image_id} ({label_map.path})")
    content = read_file(label_map.path, "label map")
    return _MapFile(name, content, image_facts(content, name, max_pixels=reading.max_pixels), label_map.rule)


def _checked_map(label_map: _MapFile, pixels: Image, reading: Reading) -> tuple[int, tuple[int, ...]]:
    """How a label map is turned to be of the size of its image, and its pixels by class."""
    turn = _map_turn(label_map, (pixels.shape[0], pixels.shape[1]))
    labels = decode_label_map(label_map.content, label_map.rule, label_map.name, turn, max_pixels=reading.max_pixels)
    counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)
    of_classes = counts[: label_map.rule.num_classes].tolist()
    return turn, (*of_classes, int(counts[IGNORED]))


def _map_turn(label_map: _MapFile, size_px: tuple[int, int]) -> int:
    """How a label map is turned to be of the size of its image."""
    facts = label_map.facts
    # One of the size of its image as it is stored is left so, whatever it says of itself.
    turn = UPRIGHT if facts.stored_size_px == size_px else facts.orientation
    if oriented_size(facts.stored_size_px, turn) != size_px:
        height, width = oriented_size(facts.stored_size_px, turn)
        raise DataError(
            f"label map {label_map.name} is {width} x {height} px", rule=f"its image is {size_px[1]} x {size_px[0]}"
        )
    return turn
