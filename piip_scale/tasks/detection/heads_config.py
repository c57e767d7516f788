"""From mmdet's own base configs, our features and a user's overrides to one mmdet model dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piip_scale.config.detection import DetectorConfig
from piip_scale.errors import ConfigError
from piip_scale.models.branch import FeatureSpec
from piip_scale.tasks.detection import dino_head as dino_head  # registers its class
from piip_scale.tasks.detection.twins import with_few_waits
from piip_scale.tasks.mmlab import PACKAGE_FOLDER, Config
from piip_scale.tasks.overrides import Tree, assign, exists, mentions, merged, nested, values_at

_BASES = {
    "mask_rcnn": "_base_/models/mask-rcnn_r50_fpn.py",
    "faster_rcnn": "_base_/models/faster-rcnn_r50_fpn.py",
    "cascade_mask_rcnn": "_base_/models/cascade-mask-rcnn_r50_fpn.py",
    "dino": "dino/dino-4scale_r50_8xb2-12e_coco.py",
}
_DINO_STRIDES_PX = (8, 16, 32)
_DINO_WIDTH = 256
_BASE_CLASSES = 80  # COCO's, in all of mmdet's base configs
_PASS_THROUGH = {"type": "PassThroughBackbone"}


@dataclass(frozen=True)
class DetectorPlan:
    """What to build, and which features to feed it.

    Attributes:
        model: mmdet's model dict, with a backbone that hands features through.
        feature_indices: The features the detector takes, as indices into the network's.
        has_masks: Whether it predicts masks.
    """

    model: Tree
    feature_indices: tuple[int, ...]
    has_masks: bool


def plan_detector(config: DetectorConfig, features: Sequence[FeatureSpec], num_classes: int) -> DetectorPlan:
    """Merges mmdet's base config, the overrides, and what follows from both and from the features.

    Overrides win over what follows. A dict merged onto a list goes onto each of its entries, unless its keys are
    indices: ``roi_head.bbox_head.fc_out_channels`` sets all stages of a cascade, ``roi_head.bbox_head.0.loss_bbox``
    one. ``_delete_=True`` in a dict replaces mmdet's instead of merging.

    Args:
        config: Kind and overrides.
        features: What the network offers, largest map first.
        num_classes: Classes without background.

    Raises:
        ConfigError: An override names nothing that exists or another number of classes, or the features do not suit
            the detector.
    """
    overrides = nested(config.overrides)
    model = merged(_base(config.kind), overrides, config.kind)
    indices = _feature_indices(config.kind, features)
    taken = [features[index] for index in indices]
    try:
        derived = _dino_values(model, taken) if config.kind == "dino" else _rcnn_values(model, taken)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            "config key detector.overrides leaves out what neck and heads must agree on",
            value=f"{type(error).__name__}: {error}",
            fix="merge onto mmdet's dicts instead of replacing them by _delete_",
        ) from error
    for path, value in derived.items():
        if not mentions(overrides, path.split(".")):
            assign(model, path.split("."), value)
    _set_classes(model, num_classes)
    return DetectorPlan(with_few_waits(model), indices, has_masks=bool(model.get("roi_head", {}).get("mask_head")))


def _base(kind: str) -> Tree:
    path = Path(PACKAGE_FOLDER) / ".mim" / "configs" / _BASES[kind]
    model: Tree = Config.fromfile(path).model.to_dict()
    del model["data_preprocessor"]
    without: Tree = _without_pretrained(model)
    return without | {"backbone": dict(_PASS_THROUGH)}


def _without_pretrained(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _without_pretrained(item)
            for key, item in value.items()
            if not (key == "init_cfg" and isinstance(item, Mapping) and item.get("type") == "Pretrained")
        }
    return [_without_pretrained(item) for item in value] if isinstance(value, list) else value


def _feature_indices(kind: str, features: Sequence[FeatureSpec]) -> tuple[int, ...]:
    strides = [spec.stride_px for spec in features]
    if kind != "dino":
        return tuple(range(len(features)))
    if not set(_DINO_STRIDES_PX) <= set(strides):
        raise ConfigError(
            "features for dino",
            value=strides,
            rule=f"it takes strides {list(_DINO_STRIDES_PX)} px",
            fix="with patches of 16 px set model.pyramid.scales=(2.0, 1.0, 0.5)",
        )
    return tuple(strides.index(stride) for stride in _DINO_STRIDES_PX)


def _rcnn_values(model: Tree, features: Sequence[FeatureSpec]) -> Tree:
    """What neck, RPN and RoI heads must agree on."""
    width, num_outs = _neck(model)
    strides = [spec.stride_px for spec in features]
    extra = [strides[-1] * 2 ** (level + 1) for level in range(num_outs - len(strides))]
    values: Tree = {
        "neck.in_channels": [spec.channels for spec in features],
        "rpn_head.in_channels": width,
        "rpn_head.anchor_generator.strides": strides[:num_outs] + extra,
        "roi_head.bbox_head.in_channels": width,
        "roi_head.bbox_head.roi_feat_size": model["roi_head"]["bbox_roi_extractor"]["roi_layer"]["output_size"],
    }
    parts = [part for part in ("bbox", "mask") if f"{part}_head" in model["roi_head"]]
    for part in parts:
        values[f"roi_head.{part}_head.in_channels"] = width
        values[f"roi_head.{part}_roi_extractor.out_channels"] = width
        values[f"roi_head.{part}_roi_extractor.featmap_strides"] = strides
    if "mask" in parts:
        # The mask head doubles its RoI's size, and targets are made at the size it puts out.
        size = model["roi_head"]["mask_roi_extractor"]["roi_layer"]["output_size"]
        values["train_cfg.rcnn.mask_size"] = 2 * size if isinstance(size, int) else [2 * side for side in size]
    return values


def _dino_values(model: Tree, features: Sequence[FeatureSpec]) -> Tree:
    """What neck, encoder, decoder and head must agree on."""
    width, levels = _neck(model)
    if width != _DINO_WIDTH:
        raise ConfigError(
            "config key detector.overrides.neck.out_channels",
            value=width,
            rule=f"mmdet's DINO decoder embeds positions in {_DINO_WIDTH} channels, whatever else is set",
            fix="make it smaller by encoder.num_layers, decoder.num_layers and num_queries",
        )
    return {
        "neck.in_channels": [spec.channels for spec in features],
        "num_feature_levels": levels,
        "encoder.layer_cfg.self_attn_cfg.num_levels": levels,
        "decoder.layer_cfg.cross_attn_cfg.num_levels": levels,
    }


def _neck(model: Tree) -> tuple[int, int]:
    """Width and number of the neck's levels."""
    for key in ("out_channels", "num_outs"):
        if not isinstance(model["neck"].get(key), int):
            raise ConfigError(
                f"config key detector.overrides.neck.{key}",
                value=model["neck"].get(key),
                rule="a neck must state its width and its number of levels",
            )
    return model["neck"]["out_channels"], model["neck"]["num_outs"]


def _set_classes(model: Tree, num_classes: int) -> None:
    """Gives every head the data's classes: labels beyond them would end in the loss, on a GPU silently."""
    heads = ("bbox_head",) if "bbox_head" in model else ("roi_head.bbox_head", "roi_head.mask_head")
    for head in (head for head in heads if exists(model, head.split("."))):
        path = [*head.split("."), "num_classes"]
        others = [value for value in values_at(model, path) if value not in (num_classes, _BASE_CLASSES)]
        if others:
            raise ConfigError(
                f"config key detector.overrides.{head}.num_classes",
                value=others[0],
                rule=f"the data set has {num_classes} classes",
                fix="leave it out: the shards decide it",
            )
        assign(model, path, num_classes)
