"""What a packed set holds, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from piip_scale.data.reading.label_maps import IGNORED, decode_label_map
from piip_scale.data.reading.shards import ShardSet

SMALL_PX, LARGE_PX = 32, 96
"""Sides of a square as large as COCO's small objects are at most, and as its large ones are at least."""


@dataclass(frozen=True)
class LabelSummary:
    """A classification set in numbers.

    Attributes:
        images_of_class: By class name, in label order.
        short_edges_px: Smallest, median and largest short edge of the images.
        long_edges_px: The same of the long edge.
    """

    num_images: int
    images_of_class: dict[str, int]
    short_edges_px: tuple[int, int, int]
    long_edges_px: tuple[int, int, int]


@dataclass(frozen=True)
class SetSummary:
    """A detection set in numbers.

    Attributes:
        objects_of_class: By class name, in label order; crowds are not counted.
        objects_of_size: ``small``, ``medium`` and ``large``, by COCO's bounds on the area.
        num_crowds: Regions of many objects.
        num_empty_images: Images without any object.
        short_edges_px: Smallest, median and largest short edge of the images.
        long_edges_px: The same of the long edge.
        objects_per_image: Median and largest.
    """

    num_images: int
    objects_of_class: dict[str, int]
    objects_of_size: dict[str, int]
    num_crowds: int
    num_empty_images: int
    short_edges_px: tuple[int, int, int]
    long_edges_px: tuple[int, int, int]
    objects_per_image: tuple[int, int]


@dataclass(frozen=True)
class MapSummary:
    """A segmentation set in numbers.

    Attributes:
        share_of_class: Of all pixels, 0 to 1, by class name in label order.
        ignored_share: Pixels of no class.
        short_edges_px: Smallest, median and largest short edge of the images.
        long_edges_px: The same of the long edge.
    """

    num_images: int
    share_of_class: dict[str, float]
    ignored_share: float
    short_edges_px: tuple[int, int, int]
    long_edges_px: tuple[int, int, int]


def summarise_labels(shards: ShardSet) -> LabelSummary:
    """Counts the images of each class; reads labels, no images.

    Raises:
        DataError: A shard is gone or its labels are damaged.
    """
    counts = Counter(shards.notes(number)["label"] for number in range(len(shards)))
    return LabelSummary(
        num_images=len(shards),
        images_of_class={name: counts[label] for label, name in enumerate(shards.classes)},
        short_edges_px=_spread(shards.sizes_px.min(axis=1)),
        long_edges_px=_spread(shards.sizes_px.max(axis=1)),
    )


def summarise_maps(shards: ShardSet) -> MapSummary:
    """Counts the pixels of each class; reads label maps, no images.

    Raises:
        DataError: A shard is gone or a label map is damaged.
    """
    pixels = np.zeros(IGNORED + 1, np.int64)
    for number, (height, width) in enumerate(shards.sizes_px.tolist()):
        # No map is larger than its image, which was held to the limit.
        most = height * width
        labels = decode_label_map(shards.label_map(number), shards.map_rule, str(shards.keys[number]), max_pixels=most)
        pixels += np.bincount(labels.ravel(), minlength=len(pixels))
    total = max(int(pixels.sum()), 1)
    return MapSummary(
        num_images=len(shards),
        share_of_class={name: pixels[label] / total for label, name in enumerate(shards.classes)},
        ignored_share=pixels[IGNORED] / total,
        short_edges_px=_spread(shards.sizes_px.min(axis=1)),
        long_edges_px=_spread(shards.sizes_px.max(axis=1)),
    )


def summarise(shards: ShardSet) -> SetSummary:
    """Counts a set's objects; reads annotations, no images.

    Raises:
        DataError: A shard is gone or annotations are damaged.
    """
    classes: Counter[int] = Counter()
    sizes: Counter[str] = Counter()
    num_objects, num_crowds = [], 0
    for number in range(len(shards)):
        notes = shards.notes(number)["annotations"]
        objects = [note for note in notes if not note["iscrowd"]]
        classes.update(note["category_id"] for note in objects)
        sizes.update(_size_name(note) for note in objects)
        num_objects.append(len(objects))
        num_crowds += len(notes) - len(objects)
    return SetSummary(
        num_images=len(shards),
        objects_of_class={category.name: classes[category.id] for category in shards.manifest.categories},
        objects_of_size={name: sizes[name] for name in ("small", "medium", "large")},
        num_crowds=num_crowds,
        num_empty_images=num_objects.count(0),
        short_edges_px=_spread(shards.sizes_px.min(axis=1)),
        long_edges_px=_spread(shards.sizes_px.max(axis=1)),
        objects_per_image=_spread(np.array(num_objects))[1:],
    )


def _size_name(note: dict[str, Any]) -> str:
    if note["area"] < SMALL_PX**2:
        return "small"
    return "medium" if note["area"] < LARGE_PX**2 else "large"


def _spread(values: npt.NDArray[Any]) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())
