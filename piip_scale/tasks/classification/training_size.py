"""How large a classifier's images are in training."""

from __future__ import annotations

from piip_scale.config.classification import ClassificationRun


def training_size_px(config: ClassificationRun) -> tuple[int, int]:
    """Height and width of every training image: crops are squares at the last branch's resolution."""
    return (config.model.branches[-1].resolution_px,) * 2
