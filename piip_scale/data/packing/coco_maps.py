"""COCO sets with masks as label maps: what segmentation trains on where a set was made for detection."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pycocotools.mask as coco_mask

from piip_scale.data.images import Image
from piip_scale.data.packing.coco import CocoImage, read_coco
from piip_scale.data.reading.files import write_bytes
from piip_scale.data.reading.label_maps import IGNORED
from piip_scale.errors import DataError

BACKGROUND = "background"
"""Class 0: pixels of no object."""

_MOST_CATEGORIES = IGNORED - 1


def write_label_maps(
    annotations: str | Path, images: str | Path, out: str | Path, *, classes: Sequence[str] = ()
) -> tuple[str, ...]:
    """Paints the objects of every image into a label map, smaller ones over larger ones.

    Args:
        annotations: The COCO JSON.
        images: The folder its ``file_name`` entries are relative to.
        out: Folder for ``images/`` (links) and ``label_maps/`` (PNG), which ``shards pack label-maps`` takes.
        classes: Category names in the label order wanted; empty takes the file's, by id.

    Returns:
        The classes in label order: ``background``, then the categories.

    Raises:
        DataError: Something in the input is wrong, it has no masks, or ``out`` cannot be written.
    """
    images, out = Path(images), Path(out)
    found = read_coco(Path(annotations), images, classes=classes, clip_boxes=True, boxes_only=False)
    if not found.has_masks:
        raise DataError(f"{annotations} holds boxes without masks", rule="label maps are painted from masks")
    if len(found.categories) > _MOST_CATEGORIES:
        raise DataError(
            f"{annotations} has {len(found.categories)} categories",
            rule=f"label maps of 8 bits hold at most {_MOST_CATEGORIES} categories beside the background and {IGNORED}",
            fix="remove some from the file",
        )
    label_of = {category["id"]: label for label, category in enumerate(found.categories, start=1)}
    names = _map_names([image.file_name for image in found.images])
    for image, name in zip(found.images, names, strict=True):
        file = io.BytesIO()
        PIL.Image.fromarray(_painted(image, label_of)).save(file, "PNG")
        write_bytes(out / "label_maps" / name, file.getvalue())
        _link(images / image.file_name, out / "images" / image.file_name)
    return (BACKGROUND, *(category["name"] for category in found.categories))


def _map_names(file_names: Sequence[str]) -> list[str]:
    """The label map of ``a.jpg`` is ``a.png``, but where that could be of ``a.tif`` too: then ``a.jpg.png``."""
    stems = [name.rpartition(".")[0] or name for name in file_names]
    counts = Counter(stems)
    return [f"{stem if counts[stem] == 1 else name}.png" for stem, name in zip(stems, file_names, strict=True)]


def _painted(image: CocoImage, label_of: dict[int, int]) -> Image:
    labels = np.zeros((image.height_px, image.width_px), np.uint8)
    for note in sorted(image.annotations, key=lambda note: -note["area"]):
        labels[_mask(note["segmentation"], labels.shape)] = label_of[note["category_id"]]
    return labels


def _mask(segmentation: Any, size_px: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    if not isinstance(segmentation, dict):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size_px))
    return np.asarray(coco_mask.decode(segmentation), bool)


def _link(source: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        # One that leads nowhere, of images that were moved.
        link.unlink(missing_ok=True)
        link.symlink_to(source.resolve())
