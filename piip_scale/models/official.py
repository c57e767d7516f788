"""Released PIIP networks, by their own configs and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from piip_scale.models.classifier import PiipClassifier
from piip_scale.models.official_config import OfficialModel, read_official_config
from piip_scale.models.official_keys import rename_official
from piip_scale.models.piip import PIIP
from piip_scale.models.trunk import Trunk


def from_official(backbone_config: Mapping[str, Any], state_dict: Mapping[str, Any] | None = None) -> Trunk:
    """A released network as one of ours, in eval mode.

    Args:
        backbone_config: ``model.backbone`` of a released detection or segmentation config, or the arguments of the
            released classification constructor.
        state_dict: Its weights by their released names: bare, or inside ``state_dict`` or ``module``, with or without
            the ``backbone.`` prefix. The module holds these very tensors. Without weights it is freshly initialised.

    Returns:
        A ``PIIP``, or a ``PiipClassifier`` for a classification config.

    Raises:
        ConfigError: The config says something the family does not have.
        ModelError: A key is missing, unexpected or of another shape; all of them are listed.
    """
    official = read_official_config(backbone_config)
    if state_dict is None:
        return _build(official).eval()
    with torch.device("meta"):
        model = _build(official)
    weights: dict[str, Tensor] = rename_official(model, official, state_dict)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _build(official: OfficialModel) -> Trunk:
    if official.head is None:
        return PIIP(official.config)
    return PiipClassifier(official.config, official.head)
