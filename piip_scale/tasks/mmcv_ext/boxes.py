"""Non-maximum suppression."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that no better box overlaps by more than ``iou_threshold``, best first.

    Args:
        boxes: (N, 4), xyxy in px.
        scores: (N,).
        iou_threshold: Overlap above which the worse box goes.
        offset: 1 where a box's last pixel counts as inside it, else 0.

    Returns:
        int64 (K,).
    """
    kept: Tensor = torchvision_nms(outer_boxes(boxes, offset), scores.float(), iou_threshold)
    return kept


def outer_boxes(boxes: Tensor, offset: int) -> Tensor:
    """Boxes with their far corner where widths and heights end, float32."""
    # mmcv adds the offset to every width and height; moving the far corner does the same.
    boxes = boxes.float()
    return torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
