"""Scores of detections against a ground truth, both in COCO's form: as COCO, LVIS and Pascal VOC count them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Result = dict[str, Any]
Floats = npt.NDArray[np.float64]
Style = Literal["coco", "lvis", "voc"]

IOU_TYPES = {"box": "bbox", "mask": "segm"}
LVIS_MOST_DETECTIONS = 300
VOC_IOU = 0.5
_AREAS = {"s": 1, "m": 2, "l": 3}
_FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}


Overlaps = Callable[[Sequence[Any], Sequence[Any]], Floats]
"""Intersection over union of M shapes with N others: float64 (M, N)."""


@dataclass(frozen=True)
class Scoring:
    """How detections are scored.

    Attributes:
        style: COCO's average precision; LVIS's, where each image says of which classes it is labelled; or Pascal VOC's
            at an IoU of 0.5.
        max_dets: The best so many detections of an image count: with COCO of each class, with LVIS of all together.
            ``None`` takes COCO's 100 and LVIS's 300; VOC counts all.
    """

    style: Style = "coco"
    max_dets: int | None = None

    @property
    def most(self) -> int:
        """``max_dets``, or what the style has."""
        return self.max_dets or (LVIS_MOST_DETECTIONS if self.style == "lvis" else 100)


@dataclass(frozen=True)
class Scores:
    """What came of scoring one kind of shape.

    Attributes:
        means: By name.
        of_classes: By measure, then of each category id.
        precision_RK: At an IoU of 0.5, of recalls 0, 0.01 to 1 and categories by rising id; -1 without objects.
        score_RK: Of the detection that reaches each recall, likewise; ``None`` where the style does not give it.
    """

    means: dict[str, float]
    of_classes: dict[str, dict[int, float]]
    precision_RK: Floats
    score_RK: Floats | None = None


def score(truth: dict[str, Any], results: Sequence[Result], part: str, scoring: Scoring) -> Scores:
    """Scores results.

    Args:
        truth: A COCO dict whose annotations are complete and numbered from 1; for LVIS its images have
            ``neg_category_ids`` and ``not_exhaustive_category_ids``, its categories ``frequency``.
        results: Entries of a COCO results file.
        part: ``box`` or ``mask``.
        scoring: How.
    """
    # Fresh dicts, because loading adds to them; without boxes, so that masks are sized by their own area.
    drop = "bbox" if part == "mask" else "segmentation"
    fresh = [{key: value for key, value in result.items() if key != drop} for result in results]
    if scoring.style == "voc":
        return _voc_scores(truth, fresh, part)
    return _coco_scores(truth, fresh, part, scoring)


def _coco_scores(truth: dict[str, Any], results: list[Result], part: str, scoring: Scoring) -> Scores:
    from faster_coco_eval import COCO, COCOeval_faster

    federated = scoring.style == "lvis"
    kept = best_of_images(results, scoring.most) if federated else results
    known = COCO(truth)
    evaluation = COCOeval_faster(known, known.loadRes(kept), iouType=IOU_TYPES[part], lvis_style=federated)
    evaluation.params.maxDets = [scoring.most] if federated else _rising(scoring.most)
    evaluation.run()
    # (IoU, recall, class, area, most detections) and (IoU, class, area, most detections)
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    at_50, at_75 = (int(np.flatnonzero(np.isclose(evaluation.params.iouThrs, iou))[0]) for iou in (0.5, 0.75))
    means = {
        "ap": _mean(precision[:, :, :, 0, -1]),
        "ap50": _mean(precision[at_50, :, :, 0, -1]),
        "ap75": _mean(precision[at_75, :, :, 0, -1]),
    }
    means |= {f"ap_{name}": _mean(precision[:, :, :, area, -1]) for name, area in _AREAS.items()}
    ids = list(evaluation.params.catIds)
    if federated:
        means |= _frequencies(truth, precision[..., 0, -1], ids)
    numbers = enumerate(evaluation.params.maxDets)
    means |= {f"ar{number}": _mean(recall[:, :, 0, index]) for index, number in numbers}
    means |= {f"ar_{name}": _mean(recall[:, :, area, -1]) for name, area in _AREAS.items()}
    curves = precision[at_50, :, :, 0, -1]
    of_classes = {
        "ap50": {number: float(curves[:, k].mean()) for k, number in enumerate(ids)},
        "ap": {number: _mean(precision[:, :, k, 0, -1]) for k, number in enumerate(ids)},
    }
    return Scores(means, of_classes, curves, evaluation.eval["scores"][at_50, :, :, 0, -1])


def _rising(most: int) -> list[int]:
    return [number for number in (1, 10) if number < most] + [most]


def _mean(values: Floats) -> float:
    known = values[values > -1]
    return float(known.mean()) if len(known) else -1.0


def _frequencies(truth: Mapping[str, Any], precision: Floats, ids: Sequence[int]) -> dict[str, float]:
    """Means over the classes that are rare, common and frequent in training."""
    of_id = {category["id"]: category["frequency"] for category in truth["categories"]}
    groups = {letter: [k for k, number in enumerate(ids) if of_id[number] == letter] for letter in _FREQUENCIES}
    return {f"ap_{_FREQUENCIES[letter]}": _mean(precision[:, :, places]) for letter, places in groups.items()}


def best_of_images(results: Sequence[Result], most: int) -> list[Result]:
    """The best so many results of each image, of all classes together."""
    of_image = defaultdict(list)
    for result in results:
        of_image[result["image_id"]].append(result)
    ranked = (sorted(found, key=lambda result: -result["score"]) for found in of_image.values())
    return [result for found in ranked for result in found[:most]]


def _voc_scores(truth: dict[str, Any], results: Sequence[Result], part: str) -> Scores:
    overlaps = box_ious if part == "box" else _mask_ious
    objects, found = (_with_shapes(truth, entries, part) for entries in (truth["annotations"], results))
    ids = sorted(category["id"] for category in truth["categories"])
    areas, points, curves = {}, {}, np.full((101, len(ids)), -1.0)
    for k, number in enumerate(ids):
        recall, precision = _voc_curve(objects, found, number, overlaps)
        areas[number], points[number] = area_ap(recall, precision), eleven_point_ap(recall, precision)
        if recall is not None:
            curves[:, k] = [precision[recall >= at].max(initial=0.0) for at in np.linspace(0, 1, 101)]
    means = {"ap50": _mean(np.array(list(areas.values()))), "ap50_11_points": _mean(np.array(list(points.values())))}
    return Scores(means, {"ap50": areas, "ap50_11_points": points}, curves)


def _with_shapes(truth: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], part: str) -> list[dict[str, Any]]:
    """Objects or results with their box or their mask's run lengths as ``shape``."""
    if part == "box":
        return [{**entry, "shape": entry["bbox"]} for entry in entries]
    from piip_scale.tasks.detection.sample_picture import run_lengths

    sizes_px = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    return [{**entry, "shape": run_lengths(entry["segmentation"], sizes_px[entry["image_id"]])} for entry in entries]


def _voc_curve(
    annotations: Sequence[Mapping[str, Any]], results: Sequence[Result], category_id: int, ious: Overlaps
) -> tuple[Floats | None, Floats]:
    """Recall and precision after each detection of a class, best first; no recall where it has no objects.

    Source: the development kit of Pascal VOC, as mmdet's ``eval_map`` has it: a detection is held to the object that it
    overlaps most; what is difficult counts for nothing, what is found twice is wrong. Boxes are corners in px without
    the kit's extra pixel. Masks in their place: AP^r of Hariharan et al., Simultaneous Detection and Segmentation.
    """
    objects: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        if annotation["category_id"] == category_id:
            objects[annotation["image_id"]].append(annotation)
    num_objects = sum(not note["iscrowd"] for of_image in objects.values() for note in of_image)
    found = sorted((r for r in results if r["category_id"] == category_id), key=lambda r: -r["score"])
    right, wrong = np.zeros(len(found)), np.zeros(len(found))
    taken: set[int] = set()
    for place, result in enumerate(found):
        note = _most_overlapped(result["shape"], objects[result["image_id"]], ious)
        if note is None:
            wrong[place] = 1
        elif not note["iscrowd"]:
            right[place], wrong[place] = note["id"] not in taken, note["id"] in taken
            taken.add(note["id"])
    rights, wrongs = right.cumsum(), wrong.cumsum()
    precision = rights / np.maximum(rights + wrongs, np.finfo(np.float64).eps)
    return (rights / num_objects if num_objects else None), precision


def _most_overlapped(shape: Any, notes: Sequence[Mapping[str, Any]], ious: Overlaps) -> Mapping[str, Any] | None:
    if not notes:
        return None
    overlaps = ious([shape], [note["shape"] for note in notes])[0]
    best = int(overlaps.argmax())
    return notes[best] if overlaps[best] >= VOC_IOU else None


def box_ious(ones: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> Floats:
    """Intersection over union of boxes ``x, y, width, height``: float64 (M, N)."""
    a, b = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (ones, others))
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, :2] + a[:, None, 2:], b[None, :, :2] + b[None, :, 2:])
    shared = (high - low).clip(min=0).prod(2)
    union = a[:, 2:].prod(1)[:, None] + b[:, 2:].prod(1)[None] - shared
    ious: Floats = shared / np.maximum(union, np.finfo(np.float64).eps)
    return ious


def _mask_ious(ones: Sequence[Any], others: Sequence[Any]) -> Floats:
    from pycocotools import mask as coco_mask

    return np.asarray(coco_mask.iou(ones, others, [0] * len(others)), np.float64)


def area_ap(recall: Floats | None, precision: Floats) -> float:
    """Area under the curve of the best precision at each recall or more; -1 without objects."""
    if recall is None:
        return -1.0
    recalls = np.concatenate([[0.0], recall, [1.0]])
    best = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    return float(((recalls[1:] - recalls[:-1]) * best[1:]).sum())


def eleven_point_ap(recall: Floats | None, precision: Floats) -> float:
    """Mean of the best precision at recalls of 0, 0.1 to 1 or more, as until VOC2009; -1 without objects."""
    if recall is None:
        return -1.0
    return float(np.mean([precision[recall >= at].max(initial=0.0) for at in np.arange(0, 1.1, 0.1)]))
