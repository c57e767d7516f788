"""Soft and grouped non-maximum suppression, box by box: one wait for the device for each."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from piip_scale.tasks.mmcv_ext.boxes import outer_boxes

_NAIVE, _LINEAR = 0, 1


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS: better boxes lower the scores of those they overlap.

    Args:
        boxes: (N, 4), xyxy in px.
        scores: (N,).
        dets: (N, 5), receives the boxes and their new scores in the order of the result.
        iou_threshold: Overlap from which scores fall, for the naive and the linear form.
        sigma: Width of the Gaussian form.
        min_score: Boxes whose score falls below it go.
        method: 0 naive (to zero), 1 linear, 2 Gaussian.
        offset: 1 where a box's last pixel counts as inside it, else 0.

    Returns:
        int64 (K,), best first.

    Source: Bodla et al., Soft-NMS, 2017.
    """
    outer = outer_boxes(boxes, offset)
    iou = box_iou(outer, outer)
    left = scores.float().clone()
    kept = torch.empty(len(boxes), dtype=torch.long)
    alive = torch.ones(len(boxes), dtype=torch.bool)
    count = 0
    while bool(alive.any()):
        best = int(torch.where(alive, left, -torch.inf).argmax())
        dets[count] = torch.cat((boxes[best], left[best : best + 1].to(boxes.dtype)))
        kept[count] = best
        alive[best] = False
        count += 1
        left = torch.where(alive, left * _decay(iou[best], iou_threshold, sigma, method), left)
        alive &= left >= min_score
    return kept[:count]


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of boxes, each led by a kept one and followed by those it suppresses, best first.

    Args:
        dets: (N, 5), xyxy in px and the score.
        iou_threshold: Overlap from which a box joins a better one's group.
    """
    order = dets[:, 4].argsort(descending=True, stable=True)
    iou = box_iou(dets[:, :4].float(), dets[:, :4].float())
    groups: list[list[int]] = []
    while len(order):
        joins = iou[order[0], order] >= iou_threshold
        joins[0] = True
        groups.append(order[joins].tolist())
        order = order[~joins]
    return groups


def _decay(iou: Tensor, iou_threshold: float, sigma: float, method: int) -> Tensor:
    if method == _NAIVE:
        return (iou < iou_threshold).float()
    if method == _LINEAR:
        return torch.where(iou >= iou_threshold, 1 - iou, 1.0)
    return torch.exp(-iou.square() / sigma)
