"""What mmseg's heads weigh, and what they cost for one image at evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from piip_scale.config.segmentation import SegmentorConfig
from piip_scale.models.branch import FeatureSpec
from piip_scale.models.counting import PartCount, num_parameters
from piip_scale.tasks.layer_macs import layer_macs
from piip_scale.tasks.segmentation.model import SegmentationHeads


def segmentor_parts(
    config: SegmentorConfig, features: Sequence[tuple[FeatureSpec, Tensor]], num_classes: int
) -> tuple[PartCount, ...]:
    """Counts the heads of one call of the network; sliding over an image makes several.

    Args:
        config: Kind, overrides and inference.
        features: What the network offers, see ``models.counting.feature_maps``.
        num_classes: Of the data set.

    Returns:
        The decode head, then the auxiliary head if there is one, which only training runs.

    Raises:
        ConfigError: Overrides that mmseg does not know, or heads that no rule here counts.
    """
    with torch.device("meta"):
        heads = SegmentationHeads(config, [spec for spec, _ in features], num_classes).eval().requires_grad_(False)
    decode, *auxiliary = heads.heads.children()
    macs = layer_macs(decode, [feature for _, feature in features])[1]
    note = "of each sliding window" if config.inference.mode == "slide" else ""
    in_training = [PartCount("auxiliary head", num_parameters(head), 0, note="in training only") for head in auxiliary]
    return (PartCount("decode head", num_parameters(decode), macs, note=note), *in_training)
