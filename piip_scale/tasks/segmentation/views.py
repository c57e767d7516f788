"""One segmentor's scores of several views of an image, averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from piip_scale.data.batch import SegmentationBatch
from piip_scale.tasks.base import Segmentation
from piip_scale.tasks.segmentation.model import SegmentationModel
from piip_scale.tasks.segmentation.sliding import label_map
from piip_scale.tasks.views import Views, mirrored


@torch.no_grad()
def predict_views(model: SegmentationModel, batches: Sequence[SegmentationBatch], views: Views) -> list[Segmentation]:
    """The class of every pixel, by the mean of the views' probabilities.

    Args:
        model: In eval mode.
        batches: The same images, at each scale.
        views: Which of these are mirrored.

    Source: mmseg's ``SegTTAModel``, which averages at the size of the stored image, here at that of the first view:
    photographs of many classes would not fit.
    """
    sums: list[Tensor] = []
    for batch in batches:
        for flip in views.flips:
            scores = model.scores(mirrored(batch) if flip else batch)
            views_of = [_probabilities(one, flip) for one in scores]
            earlier = sums or [torch.zeros_like(one) for one in views_of]
            sums = [total + _fitted(one, total) for total, one in zip(earlier, views_of, strict=True)]
    return [
        Segmentation(info.image_id, label_map(total, info.original_size_px))
        for total, info in zip(sums, batches[0].infos, strict=True)
    ]


def _probabilities(scores: Tensor, flip: bool) -> Tensor:
    shares = scores.softmax(0)
    return shares.flip(-1) if flip else shares


def _fitted(scores: Tensor, like: Tensor) -> Tensor:
    if scores.shape == like.shape:
        return scores
    return interpolate(scores[None], like.shape[1:], mode="bilinear", align_corners=False)[0]
