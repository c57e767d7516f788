"""From mmseg's own base configs, our features and a user's overrides to one mmseg model dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from piip_scale.config.segmentation import SegmentorConfig
from piip_scale.errors import ConfigError
from piip_scale.models.branch import FeatureSpec
from piip_scale.tasks.mmlab import Config
from piip_scale.tasks.overrides import Foreign, Tree, assign, exists, mentions, merged, nested
from piip_scale.tasks.segmentation.mmlab import CONFIG_FOLDER, find_class

HEADS = ("decode_head", "auxiliary_head")
BASE_CLASSES = 19
"""Classes of Cityscapes, in mmseg's base configs."""

_BASES = {"upernet": "_base_/models/upernet_r50.py"}
_NORM = {"type": "RankBatchNorm", "requires_grad": True}
_AUXILIARY_LEVEL = 2
_MMSEG = Foreign("segmentor.overrides", "mmseg", find_class)


def plan_segmentor(config: SegmentorConfig, features: Sequence[FeatureSpec], num_classes: int) -> Tree:
    """Merges mmseg's base config, the overrides, and what follows from both and from the features.

    Overrides win over what follows. ``auxiliary_head`` may be ``None``.

    Args:
        config: Kind and overrides.
        features: What the network offers, largest map first.
        num_classes: Classes of the data set.

    Returns:
        mmseg's dicts of ``decode_head`` and, unless left out, ``auxiliary_head``.

    Raises:
        ConfigError: An override names nothing that exists or another number of classes.
    """
    overrides = nested(config.overrides)
    model = merged(_base(config.kind), overrides, config.kind, _MMSEG)
    heads = {name: head for name in HEADS if (head := model[name]) is not None}
    if not all(isinstance(head, dict) for head in heads.values()) or "decode_head" not in heads:
        raise ConfigError("config key segmentor.overrides", rule="a head is a dict, and a decode_head there must be")
    for name, head in heads.items():
        for key, value in _derived(head, features).items():
            if not mentions(overrides, [name, key]):
                head[key] = value
        _set_classes(heads, name, num_classes)
    return heads


def _base(kind: str) -> Tree:
    model: Tree = Config.fromfile(CONFIG_FOLDER / _BASES[kind]).model.to_dict()
    heads = {name: model[name] for name in HEADS}
    for head in heads.values():
        head["norm_cfg"] = dict(_NORM)
    return heads


def _derived(head: Tree, features: Sequence[FeatureSpec]) -> dict[str, Any]:
    """A head takes all levels, an auxiliary one the third."""
    channels = [spec.channels for spec in features]
    if isinstance(head["in_index"], list | tuple):
        return {"in_index": list(range(len(channels))), "in_channels": channels}
    level = min(_AUXILIARY_LEVEL, len(channels) - 1)
    return {"in_index": level, "in_channels": channels[level]}


def _set_classes(heads: Tree, name: str, num_classes: int) -> None:
    path = [name, "num_classes"]
    if exists(heads, path) and heads[name]["num_classes"] not in (num_classes, BASE_CLASSES):
        raise ConfigError(
            f"config key segmentor.overrides.{name}.num_classes",
            value=heads[name]["num_classes"],
            rule=f"the data set has {num_classes} classes",
            fix="leave it out: the shards decide it",
        )
    assign(heads, path, num_classes)
