"""One detector's findings in several views of an image, merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import batched_nms

from piip_scale.data.batch import DetectionBatch
from piip_scale.tasks.base import Detections
from piip_scale.tasks.detection.model import DetectionModel
from piip_scale.tasks.views import Views, mirrored

MERGE_IOU = 0.5
"""Of two objects of a class that overlap by more, the better one stays: mmdet's own setting."""


def predict_views(model: DetectionModel, batches: Sequence[DetectionBatch], views: Views) -> list[Detections]:
    """Detections of the images of a batch, from all views, merged by NMS for each class.

    Args:
        model: In eval mode.
        batches: The same images, at each scale.
        views: Which of these are mirrored, and how many objects are kept.

    Source: mmdet's ``DetTTAModel``, which merges boxes; here an object keeps the mask of its view.
    """
    of_views = []
    for batch in batches:
        for flip in views.flips:
            found = model.predict(mirrored(batch) if flip else batch)
            sizes_px = [info.original_size_px for info in batch.infos]
            of_views.append(
                [_mirrored_back(one, size[1]) if flip else one for one, size in zip(found, sizes_px, strict=True)]
            )
    return [merged(of_image, views.most) for of_image in zip(*of_views, strict=True)]


def merged(found: Sequence[Detections], most: int) -> Detections:
    """What was found in several views of one image, in its own pixels, as one.

    Args:
        found: Of each view.
        most: Objects that are kept.
    """
    boxes = torch.cat([one.boxes_xyxy_px for one in found])
    scores, labels = torch.cat([one.scores for one in found]), torch.cat([one.labels for one in found])
    kept = batched_nms(boxes, scores, labels, MERGE_IOU)[:most]
    masks = None
    if all(one.masks_rle is not None for one in found):
        every = [rle for one in found for rle in one.masks_rle or ()]
        masks = [every[index] for index in kept.tolist()]
    return Detections(found[0].image_id, boxes[kept], scores[kept], labels[kept], masks)


def _mirrored_back(found: Detections, width: int) -> Detections:
    left, top, right, bottom = found.boxes_xyxy_px.unbind(1)
    boxes = torch.stack([width - right, top, width - left, bottom], 1)
    masks = None if found.masks_rle is None else [_mirrored_mask(rle) for rle in found.masks_rle]
    return Detections(found.image_id, boxes, found.scores, found.labels, masks)


def _mirrored_mask(rle: dict[str, Any]) -> dict[str, Any]:
    flipped = coco_mask.encode(np.asfortranarray(coco_mask.decode(rle)[:, ::-1]))
    return {"size": flipped["size"], "counts": flipped["counts"].decode()}
