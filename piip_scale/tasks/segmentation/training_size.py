"""How large a segmentor's images are in training."""

from __future__ import annotations

from piip_scale.config.segmentation import SegmentationRun


def training_size_px(config: SegmentationRun) -> tuple[int, int]:
    """Height and width of every training crop."""
    return config.data.augment.crop_px
