"""What mmseg's heads weigh, and what they cost for one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from piip_scale.config.segmentation import SegmentationRun, SegmentorConfig
from piip_scale.models.branch import FeatureSpec
from piip_scale.models.counting import PartCount, feature_maps, part_count
from piip_scale.models.work import Work
from piip_scale.tasks.counting import PyramidCounting
from piip_scale.tasks.layer_work import layer_work
from piip_scale.tasks.segmentation.model import SegmentationHeads


@dataclass(frozen=True)
class SegmentationCounting(PyramidCounting):
    """The count of a segmentor: a ``Counting``."""

    config: SegmentationRun

    def heads(self, height_px: int, width_px: int, *, training: bool) -> tuple[PartCount, ...]:
        """See ``Counting.heads``."""
        features = feature_maps(self.config.model, height_px, width_px)
        return segmentor_parts(self.config.segmentor, features, self.num_classes, training)


def segmentor_parts(
    config: SegmentorConfig, features: Sequence[tuple[FeatureSpec, Tensor]], num_classes: int, training: bool = False
) -> tuple[PartCount, ...]:
    """Counts the heads of one call of the network; sliding over an image makes several.

    Args:
        config: Kind, overrides and inference.
        features: What the network offers, see ``models.counting.feature_maps``.
        num_classes: Of the data set.
        training: Count a training step and its backward pass.

    Returns:
        The decode head, then the auxiliary head if there is one, which only training runs.

    Raises:
        ConfigError: Overrides that mmseg does not know, or heads that no rule here counts.
    """
    with torch.device("meta"):
        # In eval mode batch norms ask no other rank, and layers compute as much.
        heads = SegmentationHeads(config, [spec for spec, _ in features], num_classes).eval()
    decode, *auxiliary = heads.heads.children()
    maps = [feature for _, feature in features]
    slides = config.inference.mode == "slide" and not training
    note = "of each sliding window" if slides else ""
    parts = [part_count("decode head", decode, layer_work(decode, maps)[1], note=note, training=training)]
    for head in auxiliary:
        work = layer_work(head, maps)[1] if training else Work()
        parts.append(part_count("auxiliary head", head, work, note="in training only", training=training))
    return tuple(parts)
