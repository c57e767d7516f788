"""Label maps: an 8-bit PNG beside each image, whose pixels are class numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from piip_scale.data.images import MAX_PIXELS, Image, decode_map
from piip_scale.data.orientation import UPRIGHT
from piip_scale.data.reading.decoding import check_size, decode_pixels
from piip_scale.data.reading.manifest import MapRule
from piip_scale.data.reading.raw import RawSample, check_bytes, parse_notes
from piip_scale.errors import DataError

IGNORED = 255
"""The label of pixels that belong to no class: no training target, and no part of a metric."""

MAX_CLASSES = 255


@dataclass(frozen=True)
class MappedImage:
    """A decoded sample of a segmentation set.

    Attributes:
        pixels: RGB, uint8 (H, W, 3).
        labels: Class of every pixel, uint8 (H, W); ``IGNORED`` where there is none.
    """

    key: str
    image_id: int
    pixels: Image
    labels: Image


def decode_mapped(raw: RawSample, rule: MapRule) -> MappedImage:
    """Decodes a sample of a segmentation set.

    Raises:
        DataError: The bytes changed since they were packed, or image or label map cannot be used.
    """
    check_bytes(raw)
    notes = parse_notes(raw, "segmentation")
    pixels = decode_pixels(raw)
    # The image may be larger than the usual limit, where that was asked for; its map is no larger than it.
    most = max(MAX_PIXELS, pixels.shape[0] * pixels.shape[1])
    labels = decode_label_map(raw.label_map, rule, raw.key, raw.map_orientation, max_pixels=most)
    check_size(pixels, labels.shape[0], labels.shape[1], raw.key)
    return MappedImage(raw.key, notes["image_id"], pixels, labels)


def decode_label_map(
    content: bytes, rule: MapRule, name: str, orientation: int = UPRIGHT, *, max_pixels: int = MAX_PIXELS
) -> Image:
    """The classes of all pixels, uint8 (H, W), ``IGNORED`` where there is none.

    Raises:
        DataError: The file is no whole image of one channel, or holds a number that is no class.
    """
    stored = decode_map(content, name, orientation=orientation, max_pixels=max_pixels)
    first = 1 if rule.reduce_zero_label else 0
    wrong = (stored != IGNORED) & ((stored < 0) | (stored >= rule.num_classes + first))
    if wrong.any():
        raise DataError(
            f"label map of {name}",
            value=int(stored[wrong][0]),
            rule=f"{rule.num_classes} classes are {first}-{rule.num_classes - 1 + first}, and {IGNORED} is ignored",
            fix="name all classes, or see whether 0 is a class (--reduce-zero-label)",
        )
    labels = stored.astype(np.uint8)
    # 255 is ignored as it is; taken down like a class it would become 254. 0 wraps around to it.
    return np.where(labels == IGNORED, labels, labels - np.uint8(first)) if first else labels
