"""One classifier's logits of several views of an image, averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from piip_scale.data.batch import ClassificationBatch
from piip_scale.tasks.classification.model import Classification, ClassificationModel, best_classes
from piip_scale.tasks.views import Views, mirrored


@torch.no_grad()
def predict_views(
    model: ClassificationModel, batches: Sequence[ClassificationBatch], views: Views
) -> list[Classification]:
    """The best classes of every image, by the mean of the views' logits.

    Args:
        model: In eval mode.
        batches: The same images; a classifier's have one scale.
        views: Which of these are mirrored.
    """
    logits = [model.batch_logits(mirrored(batch) if flip else batch) for batch in batches for flip in views.flips]
    return best_classes(torch.stack(logits).mean(0), batches[0].infos)
