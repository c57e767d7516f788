"""What mmseg's heads keep for their backward pass, run on the meta device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from piip_scale.config.segmentation import SegmentationRun
from piip_scale.models.saved_activations import HeadBytes, saved_for_backward
from piip_scale.tasks.base import Outline
from piip_scale.tasks.heads import outline_with_heads
from piip_scale.tasks.segmentation.model import build_segmentation_model

_FLOAT_BYTES = 4


def outline_segmentor(config: SegmentationRun, num_classes: int, images_BCHW: Tensor, _device_type: str) -> Outline:
    """What planning a segmentor's memory needs; see ``tasks.outline``."""
    model = build_segmentation_model(config, num_classes)

    def head_bytes(features: Sequence[Tensor]) -> HeadBytes:
        # In eval mode batch norms keep as much and ask no other rank. The loss resizes scores to the labels' size,
        # and keeps them before and after the softmax.
        heads = model.heads.heads.eval()
        saved = sum(saved_for_backward(head, tuple(features))[1] for head in heads.children())
        scores = len(list(heads.children())) * num_classes * images_BCHW[:, 0].numel()
        kept = saved + 2 * _FLOAT_BYTES * scores
        return HeadBytes(kept, kept)

    return outline_with_heads(model, config.train.precision, images_BCHW, head_bytes)
