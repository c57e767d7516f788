"""Pascal VOC annotations: an XML file for each image, read and checked, and perhaps a map of its instances."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from piip_scale.data.images import Image, decode_map, image_facts, read_file
from piip_scale.data.packing.coco import CocoImage, CocoSet
from piip_scale.data.packing.label_maps import IGNORED
from piip_scale.errors import DataError
from piip_scale.logging import get_logger

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".JPG", ".JPEG", ".png", ".PNG")
_OVERHANG_PX = 1.0
"""Tools that count pixels from 0 write boxes that stick out by one to the left and above."""


@dataclass(frozen=True)
class _Object:
    """An object as its file tells it: the box as x, y, width, height in px, counted from pixel edges."""

    name: str
    box_xywh_px: tuple[float, float, float, float]
    is_difficult: bool


@dataclass(frozen=True)
class _Entry:
    """An annotation file."""

    path: Path
    file_name: str
    size_px: tuple[int, int]
    objects: tuple[_Object, ...]


def read_voc(
    annotations: Path,
    images: Path,
    *,
    names: Path | None = None,
    instance_maps: Path | None = None,
    classes: Sequence[str] = (),
    clip_boxes: bool = False,
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
        clip_boxes: Clip boxes that stick out by more than rounding, and drop those of which nothing is left.

    Raises:
        DataError: The first thing that is wrong.
    """
    entries = [_entry(path, images) for path in _files(annotations, images, names)]
    found = sorted({item.name for entry in entries for item in entry.objects})
    if not (classes or found):
        raise DataError(f"no file of {annotations} names an object", fix="name the classes, or check the folder")
    label_of_name = {name: label for label, name in enumerate(classes or found)}
    maker = _Maker(label_of_name, instance_maps, clip_boxes)
    made = tuple(maker.image(number, entry, images) for number, entry in enumerate(entries, 1))
    if maker.num_clipped or maker.num_dropped:
        get_logger(__name__).warning(
            "%s: clipped %d boxes that stuck out of their image, dropped %d of which nothing was left",
            annotations,
            maker.num_clipped,
            maker.num_dropped,
        )
    categories = tuple({"id": label, "name": name} for name, label in label_of_name.items())
    return CocoSet(made, categories, instance_maps is not None, maker.num_clipped, maker.num_dropped)


def _files(annotations: Path, images: Path, names: Path | None) -> list[Path]:
    for folder in (annotations, images):
        if not folder.is_dir():
            raise DataError(f"folder {folder} is not there", rule="VOC has a folder of XML files and one of images")
    if names is None:
        files = sorted(annotations.glob("*.xml"))
    else:
        files = [annotations / f"{name}.xml" for name in sorted(_names(names))]
    if not files:
        raise DataError(f"{names or annotations} names no image", rule="at least one XML file is needed")
    return files


def _names(file: Path) -> set[str]:
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"list {file} cannot be read", value=str(error), fix="check the path") from None
    for words in lines:
        # Lists of a single class have 1 or -1 behind each name.
        if len(words) != 1:
            raise DataError(f"a line of {file}", value=" ".join(words), rule="it holds one name, as in Main/train.txt")
    return {words[0] for words in lines}


def _entry(path: Path, images: Path) -> _Entry:
    try:
        root = ElementTree.parse(path).getroot()
    except OSError:
        raise DataError(f"annotation file {path} cannot be read", fix="check the list and the folder") from None
    except ElementTree.ParseError as error:
        raise DataError(f"annotation file {path} is no XML", value=str(error), fix="export it again") from None
    image = _image_of(path, root.findtext("filename"), images)
    size = _size(root) or _size_of_file(image)
    objects = tuple(_object(node, f"object {i} of {path}") for i, node in enumerate(root.iter("object"), 1))
    return _Entry(path, image.relative_to(images).as_posix(), size, objects)


def _image_of(path: Path, file_name: str | None, images: Path) -> Path:
    """By the annotation's own name first: the name inside is often that of an image before it was renamed."""
    tried = [images / f"{path.stem}{suffix}" for suffix in _IMAGE_SUFFIXES]
    if file_name:
        tried.append(images / Path(file_name.strip()).name)
    for image in tried:
        if image.is_file():
            return image
    raise DataError(f"image of {path} is not there", value=str(tried[0]), rule="images have the names of the XML files")


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Height and width, where the file tells them: many tools leave them out, or at 0."""
    height, width = (root.findtext(f"size/{side}", "").strip() for side in ("height", "width"))
    size = (int(height), int(width)) if height.isdecimal() and width.isdecimal() else (0, 0)
    return size if min(size) > 0 else None


def _size_of_file(image: Path) -> tuple[int, int]:
    return image_facts(read_file(image), str(image)).upright_size_px


def _object(node: ElementTree.Element, what: str) -> _Object:
    name = node.findtext("name", "").strip()
    if not name:
        raise DataError(f"{what} has no name", fix="correct or remove it")
    left, top, right, bottom = (_number(node, f"bndbox/{side}", what) for side in ("xmin", "ymin", "xmax", "ymax"))
    difficult = node.findtext("difficult", "0").strip()
    if difficult not in ("", "0", "1"):
        raise DataError(f"{what} has difficult", value=difficult, rule="it is 0 or 1", fix="correct it")
    return _Object(name, (left - 1, top - 1, right - left + 1, bottom - top + 1), difficult == "1")


def _number(node: ElementTree.Element, path: str, what: str) -> float:
    text = node.findtext(path, "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{what} has {path}", value=text, rule="it is a number of pixels", fix="correct or remove it")
    return value


class _Maker:
    """Makes COCO's entries of VOC's and counts what it repaired."""

    def __init__(self, label_of_name: dict[str, int], instance_maps: Path | None, clip_boxes: bool) -> None:
        self._label_of_name, self._instance_maps, self._clip_boxes = label_of_name, instance_maps, clip_boxes
        self.num_clipped = self.num_dropped = self._num_notes = 0

    def image(self, number: int, entry: _Entry, images: Path) -> CocoImage:
        instances = None if self._instance_maps is None else _instances(self._instance_maps, entry)
        notes = [self._note(place, item, entry, instances) for place, item in enumerate(entry.objects, 1)]
        num_bytes = (images / entry.file_name).stat().st_size
        kept = tuple(note for note in notes if note is not None)
        return CocoImage(number, entry.file_name, *entry.size_px, num_bytes, kept)

    def _note(self, place: int, item: _Object, entry: _Entry, instances: Image | None) -> dict[str, Any] | None:
        what = f"object {place} of {entry.path}"
        if item.name not in self._label_of_name:
            known = ", ".join(list(self._label_of_name)[:30])
            raise DataError(f"{what} is of class {item.name!r}", rule=f"the classes are {known}", fix="name it as well")
        box = self._box(item, entry, what)
        if box is None:
            self.num_dropped += 1
            return None
        self._num_notes += 1
        note = {
            "id": self._num_notes,
            "category_id": self._label_of_name[item.name],
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(item.is_difficult),
        }
        return note if instances is None else note | _mask_of(instances == place, box)

    def _box(self, item: _Object, entry: _Entry, what: str) -> list[float] | None:
        (height, width), (x, y, w, h) = entry.size_px, item.box_xywh_px
        left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
        overhang = max(left - x, top - y, x + w - right, y + h - bottom)
        is_empty = right <= left or bottom <= top
        if (is_empty or overhang > _OVERHANG_PX) and not self._clip_boxes:
            raise DataError(
                f"{what} has the box {[x + 1, y + 1, x + w, y + h]} (xmin, ymin, xmax, ymax)",
                rule=f"its image is {width} x {height} px, and a box has an inside",
                fix="correct it, or clip such boxes with --clip-boxes",
            )
        if is_empty:
            return None
        self.num_clipped += overhang > _OVERHANG_PX
        return [left, top, right - left, bottom - top]


def _instances(folder: Path, entry: _Entry) -> Image:
    path = folder / f"{entry.path.stem}.png"
    try:
        content = path.read_bytes()
    except OSError:
        raise DataError(
            f"instance map {path} cannot be read",
            rule="every image of the set needs one",
            fix="list the images that have one with --voc-list (ImageSets/Segmentation/train.txt)",
        ) from None
    instances = decode_map(content, str(path))
    if instances.shape != entry.size_px:
        height, width = entry.size_px
        raise DataError(f"instance map {path} is {instances.shape[::-1]} px", rule=f"its image is {width} x {height}")
    highest = int(instances[instances != IGNORED].max(initial=0))
    if highest > len(entry.objects):
        raise DataError(
            f"instance map {path} holds number {highest}",
            rule=f"{entry.path} tells of {len(entry.objects)} objects, and {IGNORED} is a border",
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
