"""What a classifier keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from piip_scale.config.classification import ClassificationRun
from piip_scale.models.saved_activations import HeadBytes
from piip_scale.tasks.base import DTYPES, Outline
from piip_scale.tasks.classification.model import build_classification_model

_FLOAT_BYTES = 4


def outline_classifier(config: ClassificationRun, num_classes: int, images_BCHW: Tensor, _device_type: str) -> Outline:
    """What planning a classifier's memory needs; see ``tasks.outline``."""
    model = build_classification_model(config, num_classes).train()
    model.set_precision(DTYPES[config.train.precision])

    def run() -> tuple[Tensor, ...]:
        *_, states = model.walk(images_BCHW)
        return tuple(state.grid_BHWC for state in states)

    def head_bytes(features: Sequence[Tensor]) -> HeadBytes:
        # A head of each branch reads one token; the common one brings all of them to one width in float32.
        kept = 0 if config.classifier.separate else sum(_FLOAT_BYTES * feature.numel() for feature in features)
        return HeadBytes(kept, kept)

    return Outline(model, model, model.parts(), "heads", run, head_bytes)
