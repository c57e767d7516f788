"""Which classes a detector takes objects for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from piip_scale.tasks.detection.scoring import box_ious

MIN_IOU, MIN_SCORE = 0.5, 0.3
NOTHING = "(nothing)"


def confusion_of(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], category_ids: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Counts what objects (rows) were found as (columns); the last row and column stand for nothing.

    Of each image's detections of a score of at least 0.3, the best first, each takes the free object that it overlaps
    most, of whichever class, where their IoU is at least 0.5. Crowds, and what lies in them, are left out.

    Args:
        truth: A complete COCO dict.
        results: Entries of a COCO results file, with boxes.
        category_ids: In label order.

    Returns:
        int64 (K + 1, K + 1) for K classes.
    """
    label_of = {number: label for label, number in enumerate(category_ids)}
    counts = np.zeros((len(label_of) + 1,) * 2, np.int64)
    found: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        if result["score"] >= MIN_SCORE:
            found[result["image_id"]].append(result)
    objects: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for note in truth["annotations"]:
        objects[note["image_id"]].append(note)
    for image_id in sorted(found.keys() | objects.keys()):
        _count(counts, objects[image_id], sorted(found[image_id], key=lambda r: -r["score"]), label_of)
    return counts


def _count(
    counts: npt.NDArray[np.int64],
    objects: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
    label_of: Mapping[int, int],
) -> None:
    nothing, is_free = len(counts) - 1, np.array([not note["iscrowd"] for note in objects], bool)
    crowd = ~is_free
    ious = box_ious([r["bbox"] for r in found], [note["bbox"] for note in objects])
    for result, overlaps in zip(found, ious, strict=True):
        column = label_of[result["category_id"]]
        free = np.where(is_free, overlaps, 0.0)
        if free.max(initial=0.0) >= MIN_IOU:
            taken = int(free.argmax())
            is_free[taken] = False
            counts[label_of[objects[taken]["category_id"]], column] += 1
        elif overlaps[crowd].max(initial=0.0) < MIN_IOU:
            counts[nothing, column] += 1
    for note, is_left in zip(objects, is_free, strict=True):
        if is_left:
            counts[label_of[note["category_id"]], nothing] += 1
