"""How a detector did on single images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import PIL.Image
import pycocotools.mask as coco_mask
import torch

from piip_scale.data.images import Image
from piip_scale.tasks.base import Detections
from piip_scale.tasks.cases import Case
from piip_scale.tasks.detection.confusion import MIN_SCORE
from piip_scale.tasks.detection.error_kinds import Tally
from piip_scale.tasks.drawing import DrawingStyle, draw_detections


def detection_cases(
    tallies: Sequence[Tally], results: Sequence[Mapping[str, Any]], categories: Sequence[Mapping[str, Any]]
) -> Iterator[Case]:
    """A case for each image that has objects or detections.

    Of images with the same score those with more objects, or more errors, come first at their end.

    Args:
        tallies: Of each image.
        results: Entries of a COCO results file.
        categories: In label order.
    """
    found = defaultdict(list)
    for result in results:
        if result["score"] >= MIN_SCORE:
            found[result["image_id"]].append(result)
    for tally in tallies:
        if tally.right + tally.wrong + tally.missed:
            score = tally.f1 + _tie(tally)
            draw = partial(_draw, found[tally.image_id], categories)
            yield Case(tally.image_id, score, _words(tally), draw)


def _tie(tally: Tally) -> float:
    """Too little to change an order of scores that differ."""
    return (tally.right - tally.wrong - tally.missed) * 1e-9


def _words(tally: Tally) -> str:
    return f"{tally.right} right, {tally.wrong} wrong, {tally.missed} missed; F1 {tally.f1:.2f}"


def _draw(
    results: Sequence[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
    pixels: Image,
    style: DrawingStyle,
) -> PIL.Image.Image:
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    ranked = sorted(results, key=lambda result: -result["score"])
    boxes = torch.tensor([_box(result) for result in ranked], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([label_of[result["category_id"]] for result in ranked], dtype=torch.long)
    scores = torch.tensor([result["score"] for result in ranked], dtype=torch.float32)
    has_masks = bool(ranked) and all("segmentation" in result for result in ranked)
    masks = [result["segmentation"] for result in ranked] if has_masks else None
    names = [category["name"] for category in categories]
    return draw_detections(pixels, Detections(0, boxes, scores, labels, masks), names, style)


def _box(result: Mapping[str, Any]) -> Sequence[float]:
    if "bbox" in result:
        box: Sequence[float] = result["bbox"]
        return box
    of_mask: Sequence[float] = coco_mask.toBbox(result["segmentation"]).tolist()
    return of_mask
