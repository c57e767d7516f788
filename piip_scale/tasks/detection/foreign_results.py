"""COCO results files, written here or elsewhere, and what LVIS's annotations say beside COCO's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from piip_scale.errors import DataError
from piip_scale.tasks.detection.scoring import Result

_TOO_LARGE = 1e30
_FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")


def read_results(path: Path, truth: Mapping[str, Any]) -> list[Result]:
    """The entries of a results file, held to the images and categories of a ground truth.

    Raises:
        DataError: It is no results file, or of another set.
    """
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise DataError(f"results {path} cannot be read", value=reason, fix="check the path") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"results {path} are not JSON", value=str(error)) from None
    if not isinstance(entries, list):
        raise DataError(f"results {path} are no list", rule="a COCO results file is a list of detections")
    images = {image["id"] for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    for number, entry in enumerate(entries):
        if problem := _problem(entry, images, categories):
            raise DataError(f"entry {number} of results {path}", value=problem, fix="name the set they were found in")
    return entries


def _problem(entry: Any, images: set[int], categories: set[int]) -> str:
    if not isinstance(entry, dict) or not {"image_id", "category_id", "score"} <= entry.keys():
        return f"{entry!r:.60} lacks image_id, category_id or score"
    if not _is_in(entry["image_id"], images):
        return f"image_id {entry['image_id']!r:.40}, and the set has no such image"
    if not _is_in(entry["category_id"], categories):
        return f"category_id {entry['category_id']!r:.40}, and the set has no such category"
    box = entry.get("bbox")
    is_box = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))
    if not _is_number(entry["score"]) or not (is_box or (box is None and "segmentation" in entry)):
        return f"{entry!r:.60} with a score or box that is none"
    return ""


def _is_in(value: Any, ids: set[int]) -> bool:
    return isinstance(value, int | str) and value in ids


def _is_number(value: Any) -> bool:
    """Not NaN, which JSON of Python may hold, and no whole number that no float holds."""
    return isinstance(value, int | float) and abs(value) < _TOO_LARGE


def federated(truth: dict[str, Any], root: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A ground truth with what LVIS's file says of its images and categories.

    Args:
        truth: A COCO dict.
        root: LVIS's annotation file.
        name: Its path.

    Raises:
        DataError: The file is not LVIS's.
    """
    images = {image["id"]: image for image in root["images"]}
    categories = {category["id"]: category for category in root["categories"]}
    _require(images, _FEDERATED, f"annotation file {name}: image")
    _require(categories, ("frequency",), f"annotation file {name}: category")
    return truth | {
        "images": [image | {key: images[image["id"]][key] for key in _FEDERATED} for image in truth["images"]],
        "categories": [c | {"frequency": categories[c["id"]]["frequency"]} for c in truth["categories"]],
    }


def _require(entries: Mapping[int, Mapping[str, Any]], keys: Sequence[str], owner: str) -> None:
    for number, entry in entries.items():
        if missing := [key for key in keys if key not in entry]:
            raise DataError(
                f"{owner} {number} has no {missing[0]}",
                rule="LVIS's metric needs what LVIS's files say",
                fix="name LVIS's annotation file with --coco, or leave out --metric lvis",
            )
