"""Pascal VOC annotations: an XML file for each image, read and checked, and perhaps a map of its instances."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from piip_scale.data.images import MAX_PIXELS, Image, decode_map
from piip_scale.data.orientation import Exif
from piip_scale.data.packing.coco import CocoImage, CocoSet
from piip_scale.data.packing.door import chosen_classes
from piip_scale.data.packing.problems import Problems
from piip_scale.data.packing.voc_xml import VocEntry, VocObject, classes_of, read_entries
from piip_scale.data.reading.label_maps import IGNORED
from piip_scale.errors import DataError
from piip_scale.logging import get_logger

_OVERHANG_PX = 1.0
"""Tools that count pixels from 0 write boxes that stick out by one to the left and above."""


def read_voc(
    annotations: Path,
    images: Path,
    *,
    names: Path | None = None,
    instance_maps: Path | None = None,
    classes: Sequence[str] = (),
    subset: bool = False,
    clip_boxes: bool = False,
    exif: Exif = "auto",
    max_pixels: int = MAX_PIXELS,
    problems: Problems | None = None,
) -> CocoSet:
    """Reads VOC's annotations and checks them against their images, of which only headers are read.

    Images are numbered from 1 in the order of their names. Boxes include their first and last pixel, counted from 1,
    as in VOC's own files. What is ``difficult`` becomes a region to ignore (``iscrowd``); ``truncated`` and
    ``occluded`` objects are objects like others.

    Args:
        annotations: The folder of XML files.
        images: The folder of images of the same names.
        names: A text file of names to take, one in a line (``ImageSets/Main/train.txt``); all where ``None``.
        instance_maps: The folder of PNG files whose pixels number the objects of an XML file from 1
            (``SegmentationObject``); without one, there are boxes only.
        classes: Names in the label order wanted; empty takes those that occur, sorted.
        subset: ``classes`` are some of those that occur; objects of others are left out.
        clip_boxes: Clip boxes that stick out by more than rounding, and drop those of which nothing is left.
        exif: What becomes of orientations in files.
        max_pixels: Images and maps of more are refused.
        problems: Takes what is wrong; raised here where not given.

    Raises:
        DataError: What is wrong, or what keeps the whole set from being read.
    """
    gathered = problems if problems is not None else Problems()
    read = read_entries(annotations, images, names, gathered, exif, max_pixels)
    entries = read.images
    found = classes_of(entries)
    if not (classes or found or gathered.stop):
        raise DataError(f"no file of {annotations} names an object", fix="name the classes, or check the folder")
    chosen = chosen_classes(classes, found, str(annotations), subset=subset) if classes else tuple(found)
    maker = _Maker(chosen, instance_maps, gathered, clip_boxes=clip_boxes, subset=subset, max_pixels=max_pixels)
    images_or_none = [maker.image(number, entry) for number, entry in enumerate(entries, 1)]
    made = tuple(image for image in images_or_none if image is not None)
    if problems is None:
        gathered.settle(str(annotations))
    _log(annotations, maker.done, read.num_sized)
    categories = tuple({"id": label, "name": name} for label, name in enumerate(chosen))
    done = maker.done
    counts = {"num_others": done["others"], "num_sized": read.num_sized}
    other = {name: count for name, count in counts.items() if count}
    has_masks = instance_maps is not None
    return CocoSet(made, categories, has_masks, done["clipped"], done["dropped"], other, read.undecided)


def _log(annotations: Path, done: Counter[str], num_sized: int) -> None:
    if num_sized:
        get_logger(__name__).warning("%s: took the sizes of %d images from their files", annotations, num_sized)
    if done["clipped"] or done["dropped"]:
        get_logger(__name__).warning(
            "%s: clipped %d boxes that stuck out of their image, dropped %d of which nothing was left",
            annotations,
            done["clipped"],
            done["dropped"],
        )
    if done["others"]:
        get_logger(__name__).warning("%s: left out %d objects of other classes", annotations, done["others"])


class _Maker:
    """Makes COCO's entries of VOC's.

    Attributes:
        done: How many boxes were ``clipped`` and ``dropped``, how many objects are of ``others``.
    """

    def __init__(
        self,
        classes: Sequence[str],
        instance_maps: Path | None,
        problems: Problems,
        *,
        clip_boxes: bool,
        subset: bool,
        max_pixels: int,
    ) -> None:
        self._label_of_name = {name: label for label, name in enumerate(classes)}
        self._instance_maps, self._problems = instance_maps, problems
        self._clip_boxes, self._subset, self._max_pixels = clip_boxes, subset, max_pixels
        self._num_notes = 0
        self.done: Counter[str] = Counter()

    def image(self, number: int, entry: VocEntry) -> CocoImage | None:
        """An image with its objects, those left out that are wrong; ``None`` where its map is."""
        instances, notes = None, []
        if self._instance_maps is not None:
            with self._problems.collected("image"):
                instances = _instances(self._instance_maps, entry, self._max_pixels)
            if instances is None:
                return None
        for position, item in enumerate(entry.objects, 1):
            with self._problems.collected("annotation"):
                notes += self._notes(position, item, entry, instances)
        return CocoImage(number, entry.file_name, *entry.size_px, entry.file_bytes, tuple(notes))

    def _notes(self, position: int, item: VocObject, entry: VocEntry, instances: Image | None) -> list[dict[str, Any]]:
        """The object as an annotation; none where it is left out."""
        owner = f"object {position} of {entry.path}"
        if item.name not in self._label_of_name:
            if self._subset:
                self.done["others"] += 1
                return []
            known = ", ".join(list(self._label_of_name)[:30])
            raise DataError(
                f"{owner} is of class {item.name!r}", rule=f"the classes are {known}", fix="name it as well"
            )
        box = self._box(item, entry, owner)
        if box is None:
            self.done["dropped"] += 1
            return []
        self._num_notes += 1
        note = {
            "id": self._num_notes,
            "category_id": self._label_of_name[item.name],
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(item.is_difficult),
        }
        return [note if instances is None else note | _mask_of(instances == position, box)]

    def _box(self, item: VocObject, entry: VocEntry, owner: str) -> list[float] | None:
        (height, width), (x, y, w, h) = entry.size_px, item.box_xywh_px
        left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
        overhang = max(left - x, top - y, x + w - right, y + h - bottom)
        is_empty = right <= left or bottom <= top
        if (is_empty or overhang > _OVERHANG_PX) and not self._clip_boxes:
            raise DataError(
                f"{owner} has the box {[x + 1, y + 1, x + w, y + h]} (xmin, ymin, xmax, ymax)",
                rule=f"its image is {width} x {height} px, and a box has an inside",
                fix="correct it, or clip such boxes with --clip-boxes",
            )
        if is_empty:
            return None
        self.done["clipped"] += overhang > _OVERHANG_PX
        return [left, top, right - left, bottom - top]


def _instances(folder: Path, entry: VocEntry, max_pixels: int) -> Image:
    path = folder / f"{entry.path.stem}.png"
    try:
        content = path.read_bytes()
    except OSError:
        raise DataError(
            f"instance map {path} cannot be read",
            rule="every image of the set needs one",
            fix="list the images that have one with --voc-list (ImageSets/Segmentation/train.txt)",
        ) from None
    instances = decode_map(content, str(path), max_pixels=max_pixels)
    if instances.shape != entry.size_px:
        height, width = entry.size_px
        raise DataError(f"instance map {path} is {instances.shape[::-1]} px", rule=f"its image is {width} x {height}")
    highest = int(instances[instances != IGNORED].max(initial=0))
    if highest > len(entry.objects):
        raise DataError(
            f"instance map {path} holds number {highest}",
            rule=f"{entry.path} has {len(entry.objects)} objects, and {IGNORED} is a border",
        )
    return instances


def _mask_of(mask: np.ndarray, box_xywh_px: list[float]) -> dict[str, Any]:
    """What an annotation gets from the pixels of its object."""
    from pycocotools import mask as coco_mask

    # An object that the map does not show, or only outside its box, teaches nothing: it is ignored with its box.
    left, top = (int(side) for side in box_xywh_px[:2])
    right, bottom = (math.ceil(low + extent) for low, extent in zip(box_xywh_px[:2], box_xywh_px[2:], strict=True))
    if not mask[top:bottom, left:right].any():
        return {"segmentation": [_corners(*box_xywh_px)], "iscrowd": 1}
    packed = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    counts = {"size": list(map(int, packed["size"])), "counts": packed["counts"].decode("ascii")}
    return {"segmentation": counts, "area": float(mask.sum())}


def _corners(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]
