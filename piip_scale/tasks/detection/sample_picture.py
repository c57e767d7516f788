"""A packed sample and its objects, drawn."""

from __future__ import annotations

from typing import Any

import PIL.Image
import torch
from pycocotools import mask as coco_mask

from piip_scale.data.reading.decoding import decode_pixels
from piip_scale.data.reading.sample_set import SampleSet
from piip_scale.tasks.base import Detections
from piip_scale.tasks.drawing import DrawingStyle, draw_detections, draw_regions


def draw_objects(shards: SampleSet, number: int, style: DrawingStyle) -> PIL.Image.Image:
    """The image with boxes, masks and names; regions of many objects in grey.

    Raises:
        DataError: The sample is damaged.
    """
    raw = shards.read(number)
    pixels = decode_pixels(raw)
    notes = shards.notes(number)
    picture = draw_detections(pixels, _ground_truth(notes, shards), shards.classes, style)
    crowds = [note["bbox"] for note in notes["annotations"] if note["iscrowd"]]
    corners = [(x, y, x + width, y + height) for x, y, width, height in crowds]
    draw_regions(picture, corners, style.long_edge_px / max(pixels.shape[:2]))
    return picture


def _ground_truth(notes: dict[str, Any], shards: SampleSet) -> Detections:
    """A sample's objects in the shape of detections."""
    objects = [note for note in notes["annotations"] if not note["iscrowd"]]
    boxes = torch.tensor([note["bbox"] for note in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    size = notes["height"], notes["width"]
    masks = [run_lengths(note["segmentation"], size) for note in objects] if shards.has_masks else None
    labels = torch.tensor([shards.label_of_category[note["category_id"]] for note in objects], dtype=torch.long)
    return Detections(notes["image_id"], boxes, torch.ones(len(objects)), labels, masks)


def run_lengths(segmentation: Any, size_px: tuple[int, int]) -> dict[str, Any]:
    """An annotation's mask as run lengths.

    Args:
        segmentation: Polygons, or run lengths.
        size_px: Height and width of its image.
    """
    if isinstance(segmentation, dict):
        return segmentation
    merged: dict[str, Any] = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size_px))
    return merged
