"""COCO annotation files: read, checked against their images, and split."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from piip_scale.data.reading.files import json_bytes, write_bytes
from piip_scale.errors import DataError
from piip_scale.logging import get_logger

_MAX_ID = 2**63 - 1
"""Indexes keep ids and sizes as int64."""

OVERHANG_TOLERANCE_PX = 1.0
"""Annotation tools round: a box may stick out by less than this and is clipped without being asked."""


@dataclass(frozen=True)
class CocoImage:
    """One image of a set and its checked annotations.

    Attributes:
        annotations: COCO dicts with ``id, category_id, bbox, area, iscrowd`` and, where there is a mask,
            ``segmentation``.
    """

    image_id: int
    file_name: str
    height_px: int
    width_px: int
    file_bytes: int
    annotations: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class CocoSet:
    """A checked set.

    Attributes:
        images: In the file's order.
        categories: ``{"id", "name"}`` in label order.
        has_masks: Every annotation has a segmentation.
        num_clipped: Boxes that stuck out and were clipped.
        num_dropped: Boxes of which nothing was left (only with ``clip_boxes``).
    """

    images: tuple[CocoImage, ...]
    categories: tuple[dict[str, Any], ...]
    has_masks: bool
    num_clipped: int
    num_dropped: int


def read_coco(
    annotations: Path,
    images: Path,
    *,
    classes: Sequence[str] = (),
    clip_boxes: bool = False,
    boxes_only: bool = False,
) -> CocoSet:
    """Reads a COCO file and checks it against its image folder, without opening the images.

    Args:
        annotations: The COCO JSON.
        images: The folder its ``file_name`` entries are relative to.
        classes: Category names in the label order wanted; empty takes the file's, by id.
        clip_boxes: Clip boxes that stick out by any amount and drop those of which nothing is left.
        boxes_only: Leave masks out.

    Raises:
        DataError: The first thing that is wrong.
    """
    root = load_coco_json(annotations)
    if not images.is_dir():
        raise DataError(
            f"image folder {images} is not there", rule=f"it holds the images of {annotations}", fix="check the path"
        )
    categories = _categories(root, annotations, classes)
    checker = _BoxChecker(annotations, frozenset(c["id"] for c in categories), clip_boxes, boxes_only)
    entries = _image_entries(root, annotations)
    by_image = checker.by_image(root["annotations"], entries)
    checked = tuple(_image(entry, by_image[entry["id"]], images, annotations) for entry in entries.values())
    if checker.num_clipped or checker.num_dropped:
        get_logger(__name__).warning(
            "%s: clipped %d boxes that stuck out of their image, dropped %d of which nothing was left",
            annotations,
            checker.num_clipped,
            checker.num_dropped,
        )
    has_masks = _has_masks(checked, annotations)
    return CocoSet(checked, categories, has_masks, checker.num_clipped, checker.num_dropped)


def load_coco_json(annotations: Path) -> dict[str, Any]:
    """The parsed file, known to be a dict with non-empty images and categories and a list of annotations.

    Raises:
        DataError: The file is absent, empty, not JSON, or not COCO.
    """
    content = _read_text(annotations)
    try:
        root: dict[str, Any] = json.loads(content)
    except json.JSONDecodeError as error:
        raise DataError(
            f"annotation file {annotations} is not valid JSON",
            value=error.msg,
            rule=f"line {error.lineno}, column {error.colno} of {len(content)} characters cannot be read",
            fix="copy or export the file again",
        ) from None
    # Python's own limits: a number of thousands of digits, lists in lists without end.
    except (ValueError, RecursionError) as error:
        raise _file_error(annotations, "is not a COCO file", str(error)) from None
    keys = ("images", "annotations", "categories")
    missing = [key for key in keys if not isinstance(root, dict) or not isinstance(root.get(key), list)]
    if missing:
        raise _file_error(annotations, f"has no list {', '.join(missing)}", f"COCO needs the lists {', '.join(keys)}")
    for key in keys:
        if not all(isinstance(item, dict) for item in root[key]):
            raise _file_error(annotations, f"has an entry in {key!r} that is not a dict", "COCO lists hold dicts")
    for key in ("images", "categories"):
        if not root[key]:
            raise _file_error(annotations, f"has no {key}", "at least one is needed")
    return root


def split_coco(annotations: Path, out: Path, *, val_share: float = 0.2, seed: int = 0) -> tuple[Path, Path]:
    """Splits a set by image into ``instances_train.json`` and ``instances_val.json`` under ``out``.

    The split depends on the seed and the image ids alone, and gives each side at least one image.

    Returns:
        The paths of the training and of the validation file.

    Raises:
        DataError: The file cannot be used, or has fewer than two images.
    """
    root = load_coco_json(annotations)
    entries = _image_entries(root, annotations)
    ids = sorted(entries)
    stray = next((note for note in root["annotations"] if not _is_among(note.get("image_id"), entries)), None)
    if stray is not None:
        raise _stray_note(annotations, stray)
    if len(ids) < 2:
        raise _file_error(annotations, "has one image", "a split needs at least two", "add images")
    if not 0 < val_share < 1:
        raise DataError("val_share of a split", value=val_share, rule="it must be between 0 and 1")
    shuffled = np.random.default_rng(seed).permutation(len(ids))
    num_val = min(max(round(val_share * len(ids)), 1), len(ids) - 1)
    val_ids = {ids[index] for index in shuffled[:num_val]}
    paths = out / "instances_train.json", out / "instances_val.json"
    for path, keep in zip(paths, (set(ids) - val_ids, val_ids), strict=True):
        part = {
            **root,
            "images": [image for image in root["images"] if image["id"] in keep],
            "annotations": [note for note in root["annotations"] if note.get("image_id") in keep],
        }
        write_bytes(path, json_bytes(part))
    return paths


def _read_text(annotations: Path) -> str:
    try:
        content = annotations.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DataError(
            f"annotation file {annotations} is not there", rule="a COCO JSON file is needed", fix="check the path"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"annotation file {annotations} cannot be read", value=str(error)) from error
    if not content.strip():
        raise _file_error(annotations, "is empty", "a COCO JSON is needed", "copy or export the file again")
    return content


def _file_error(annotations: Path, problem: str, rule: str, fix: str = "export the file again") -> DataError:
    return DataError(f"annotation file {annotations} {problem}", rule=rule, fix=fix)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_ID


def _unique_by_id(entries: Iterable[dict[str, Any]], what: str, annotations: Path) -> dict[int, dict[str, Any]]:
    by_id: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if not _is_id(entry.get("id")):
            raise _file_error(
                annotations, f"has {what} id {entry.get('id')!r}", "ids are whole numbers from 0, below 2^63"
            )
        if entry["id"] in by_id:
            raise _file_error(annotations, f"has {what} id {entry['id']} twice", "ids are unique", "renumber them")
        by_id[entry["id"]] = entry
    return by_id


def _categories(root: dict[str, Any], annotations: Path, classes: Sequence[str]) -> tuple[dict[str, Any], ...]:
    by_id = _unique_by_id(root["categories"], "category", annotations)
    names = [by_id[key].get("name") for key in sorted(by_id)]
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        raise _file_error(annotations, f"has category names {names}", "each needs a name of its own")
    categories = {by_id[key]["name"]: {"id": key, "name": by_id[key]["name"]} for key in sorted(by_id)}
    if not classes:
        return tuple(categories.values())
    if set(classes) != set(names) or len(set(classes)) != len(classes):
        raise DataError(
            f"categories of {annotations}",
            value=names,
            rule=f"they must be the classes {list(classes)}",
            fix="change the classes, or the file's categories",
        )
    return tuple(categories[name] for name in classes)


def _image_entries(root: dict[str, Any], annotations: Path) -> dict[int, dict[str, Any]]:
    entries = _unique_by_id(root["images"], "image", annotations)
    for key, entry in entries.items():
        name = entry.get("file_name")
        if not isinstance(name, str) or not name or os.path.isabs(name) or ".." in Path(name).parts:
            raise _file_error(annotations, f"has file_name {name!r} at image {key}", "it is a path below the folder")
        size = entry.get("height"), entry.get("width")
        if not all(_is_id(side) and side for side in size):
            raise _file_error(annotations, f"has height, width {size} at image {key}", "both are positive integers")
    return entries


def _image(entry: dict[str, Any], notes: list[dict[str, Any]], images: Path, annotations: Path) -> CocoImage:
    path = images / entry["file_name"]
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:
        size = None
    if size is None:
        raise DataError(
            f"image {entry['id']} of {annotations} is not there",
            value=str(path),
            rule="every image of the file must lie in the image folder",
            fix="check the image folder, or remove the entry",
        )
    return CocoImage(entry["id"], entry["file_name"], entry["height"], entry["width"], size, tuple(notes))


def _has_masks(images: Sequence[CocoImage], annotations: Path) -> bool:
    notes = [note for image in images for note in image.annotations]
    without = [note["id"] for note in notes if "segmentation" not in note]
    if without and len(without) < len(notes):
        raise DataError(
            f"annotation file {annotations} has masks for {len(notes) - len(without)} of {len(notes)} annotations",
            rule=f"all have one or none has; the first without is {without[0]}",
            fix="complete the masks, or leave them out with --boxes-only",
        )
    return bool(notes) and not without


class _BoxChecker:
    """Checks annotations one by one and counts what it repaired."""

    def __init__(self, annotations: Path, category_ids: frozenset[int], clip_boxes: bool, boxes_only: bool) -> None:
        self._file, self._category_ids = annotations, category_ids
        self._clip_boxes, self._boxes_only = clip_boxes, boxes_only
        self.num_clipped = self.num_dropped = 0

    def by_image(
        self, notes: Sequence[dict[str, Any]], images: Mapping[int, dict[str, Any]]
    ) -> dict[int, list[dict[str, Any]]]:
        """Checked annotations under the id of their image."""
        found: dict[int, list[dict[str, Any]]] = {key: [] for key in images}
        for note in _unique_by_id(notes, "annotation", self._file).values():
            if not _is_among(note.get("image_id"), found):
                raise _stray_note(self._file, note)
            checked = self._note(note, images[note["image_id"]])
            if checked is not None:
                found[note["image_id"]].append(checked)
        return found

    def _note(self, note: dict[str, Any], image: dict[str, Any]) -> dict[str, Any] | None:
        key = note["id"]
        if not _is_among(note.get("category_id"), self._category_ids):
            known = ", ".join(map(str, sorted(self._category_ids)[:20]))
            raise self._error(
                f"annotation {key} has category id {note.get('category_id')!r}",
                f"the known ids are {known}",
                "add the category or correct the id",
            )
        box = self._box(note, image)
        if box is None:
            self.num_dropped += 1
            return None
        area = note.get("area")
        checked = {
            "id": key,
            "category_id": note["category_id"],
            "bbox": box,
            "area": float(area) if _is_number(area) else box[2] * box[3],
            "iscrowd": self._crowd(note),
        }
        if note.get("segmentation") and not self._boxes_only:
            checked["segmentation"] = self._segmentation(note, image)
        return checked

    def _crowd(self, note: dict[str, Any]) -> int:
        # Of the text "0" Python would make a crowd, which training leaves out.
        value = note.get("iscrowd")
        if value not in (0, 1, None):
            raise self._error(f"annotation {note['id']} has iscrowd {value!r}", "it is 0 or 1")
        return int(value or 0)

    def _box(self, note: dict[str, Any], image: dict[str, Any]) -> list[float] | None:
        box, key = note.get("bbox"), note["id"]
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(side) for side in box):
            raise self._error(f"annotation {key} has bbox {box!r}", "it is four finite numbers x, y, width, height")
        x, y, width, height = map(float, box)
        if (width <= 0 or height <= 0) and not self._clip_boxes:
            raise self._error(
                f"annotation {key} of image {image['id']} has the empty box {box}",
                "width and height are above 0",
                "correct it, or drop such boxes with --clip-boxes",
            )
        left, top = max(x, 0.0), max(y, 0.0)
        right, bottom = min(x + width, image["width"]), min(y + height, image["height"])
        overhang = max(-x, -y, x + width - image["width"], y + height - image["height"])
        tolerable = overhang < OVERHANG_TOLERANCE_PX and right > left and bottom > top
        if not tolerable and not self._clip_boxes:
            raise self._error(
                f"annotation {key} has the box {box} outside image {image['id']}",
                f"that image ({image['file_name']}) is {image['width']} x {image['height']} px",
                "correct it, or clip such boxes with --clip-boxes",
            )
        if right <= left or bottom <= top:
            return None
        if overhang <= 0:
            return [x, y, width, height]
        self.num_clipped += 1
        return [left, top, right - left, bottom - top]

    def _segmentation(self, note: dict[str, Any], image: dict[str, Any]) -> Any:
        value = note["segmentation"]
        if isinstance(value, dict) and value.get("size") == [image["height"], image["width"]]:
            if isinstance(value.get("counts"), str):
                return {"size": value["size"], "counts": value["counts"]}
            if _is_run_lengths(value.get("counts"), image["height"] * image["width"]):
                return _compressed(value)
        if isinstance(value, list) and all(_is_polygon(polygon) for polygon in value):
            return value
        raise self._error(
            f"annotation {note['id']} has a segmentation that cannot be read",
            f"it is polygons of at least 3 points, or run lengths of size [{image['height']}, {image['width']}]",
        )

    def _error(self, problem: str, rule: str, fix: str = "correct or remove it") -> DataError:
        return DataError(f"{self._file}: {problem}", rule=rule, fix=fix)


def _is_among(value: object, ids: Container[int]) -> bool:
    return _is_id(value) and value in ids


def _stray_note(annotations: Path, note: dict[str, Any]) -> DataError:
    problem = f"{annotations}: annotation {note.get('id')} is of image {note.get('image_id')!r}"
    return DataError(problem, rule="no image has that id", fix="remove it")


def _is_number(value: object) -> TypeGuard[int | float]:
    # An int of hundreds of digits is finite, and no float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_polygon(value: object) -> bool:
    return isinstance(value, list) and len(value) >= 6 and len(value) % 2 == 0 and all(map(_is_number, value))


def _is_run_lengths(value: object, num_pixels: int) -> bool:
    return isinstance(value, list) and all(map(_is_id, value)) and sum(value) == num_pixels


def _compressed(value: dict[str, Any]) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    height, width = value["size"]
    packed = coco_mask.frPyObjects(value, height, width)
    return {"size": value["size"], "counts": packed["counts"].decode("ascii")}
