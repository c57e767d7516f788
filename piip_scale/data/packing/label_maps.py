"""Label maps: an 8-bit PNG beside each image, whose pixels are class numbers."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
import PIL.Image

from piip_scale.data.sample import Image, RawSample, check_bytes, check_size, decode_image, parse_notes
from piip_scale.errors import DataError

IGNORED = 255
"""The label of pixels that belong to no class: no training target, and no part of a metric."""

MAX_CLASSES = 255


@dataclass(frozen=True)
class MapRule:
    """What the pixels of a set's label maps mean.

    Attributes:
        num_classes: Of the set.
        reduce_zero_label: 0 is ignored and the classes count from 1, as in ADE20K.
    """

    num_classes: int
    reduce_zero_label: bool


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
    pixels = decode_image(raw.image, raw.key)
    labels = decode_label_map(raw.label_map, rule, raw.key)
    check_size(pixels, labels.shape[0], labels.shape[1], raw.key)
    return MappedImage(raw.key, notes["image_id"], pixels, labels)


def decode_label_map(content: bytes, rule: MapRule, name: str) -> Image:
    """The classes of all pixels, uint8 (H, W), ``IGNORED`` where there is none.

    Raises:
        DataError: The file is no whole 8-bit image of one channel, or holds a number that is no class.
    """
    labels = stored_map(content, name)
    if rule.reduce_zero_label:
        # 255 is ignored as it is; taken down like a class it would become 254.
        labels = np.where(labels == IGNORED, IGNORED, labels - np.uint8(1)).astype(np.uint8)
    wrong = (labels >= rule.num_classes) & (labels != IGNORED)
    if wrong.any():
        first = 1 if rule.reduce_zero_label else 0
        raise DataError(
            f"label map of {name}",
            value=int(labels[wrong][0]) + first,
            rule=f"{rule.num_classes} classes are {first}-{rule.num_classes - 1 + first}, and {IGNORED} is ignored",
            fix="name all classes, or see whether 0 is a class (--reduce-zero-label)",
        )
    return labels


def stored_map(content: bytes, name: str) -> Image:
    """The numbers of a label map as they are in its file, uint8 (H, W).

    Raises:
        DataError: The file is no whole 8-bit image of one channel.
    """
    try:
        with PIL.Image.open(io.BytesIO(content)) as image:
            if image.mode not in ("L", "P"):
                raise ValueError(f"its pixels are of mode {image.mode}")
            return np.array(image, np.uint8)
    except PIL.UnidentifiedImageError:
        value = f"{len(content)} bytes in no format that Pillow reads"
    # Pillow's decoders raise any of these for damaged files.
    except (ValueError, OSError, SyntaxError, EOFError, IndexError, struct.error) as error:
        value = str(error).strip()
    raise DataError(
        f"label map of {name} cannot be decoded",
        value=value,
        rule="it must be a whole image of one channel of 8 bits, or with a palette",
    )
