"""What mmdet's necks and heads weigh, and what they cost for one image at evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from piip_scale.config.detection import DetectorConfig
from piip_scale.errors import ConfigError
from piip_scale.models.branch import FeatureSpec
from piip_scale.models.counting import MACS_PER_SAMPLE, PartCount, num_parameters
from piip_scale.tasks.detection.model import DetectionHeads
from piip_scale.tasks.layer_macs import layer_macs, linear_macs

_ROI_HEADS = ("StandardRoIHead", "CascadeRoIHead")
_Rule = Callable[[Any, Sequence[Tensor]], Iterator[PartCount]]


def detector_parts(
    config: DetectorConfig, features: Sequence[tuple[FeatureSpec, Tensor]], num_classes: int
) -> tuple[PartCount, ...]:
    """Counts neck and heads. Norms, activations, RoIAlign and NMS are no multiply-accumulates of layers: left out.

    Args:
        config: Kind and overrides.
        features: What the network offers, see ``models.counting.feature_maps``.
        num_classes: Classes without background.

    Returns:
        The neck, then of R-CNNs RPN, box head and perhaps mask head, with as many proposals and detections as the
        detector's ``test_cfg`` lets through; of DINO encoder, query selection, decoder and box head.

    Raises:
        ConfigError: Overrides that mmdet does not know, or heads that no rule here counts.
    """
    with torch.device("meta"):
        heads = DetectionHeads(config, [spec for spec, _ in features], num_classes).eval().requires_grad_(False)
    detector: Any = heads.detector
    levels, macs = layer_macs(detector.neck, tuple(features[index][1] for index in heads.feature_indices))
    neck = PartCount("neck", num_parameters(detector.neck), macs, note=f"{len(levels)} levels")
    return (neck, *_rule_of(detector)(detector, levels))


def _rule_of(detector: Any) -> _Rule:
    name = type(getattr(detector, "roi_head", detector)).__name__
    if name in _ROI_HEADS:
        return _rcnn_parts
    if name == "DINO":
        return _dino_parts
    rule = f"there are rules for DINO, {' and '.join(_ROI_HEADS)}"
    raise ConfigError("heads cannot be counted", value=name, rule=rule)


def _rcnn_parts(detector: Any, levels: Sequence[Tensor]) -> Iterator[PartCount]:
    rpn, roi = detector.rpn_head, detector.roi_head
    yield PartCount("rpn", num_parameters(rpn), layer_macs(rpn, levels)[1])
    yield _roi_part("box head", roi.bbox_head, roi.bbox_roi_extractor, _limit("rpn", rpn.test_cfg), "proposals")
    if roi.with_mask:
        yield _roi_part("mask head", roi.mask_head, roi.mask_roi_extractor, _limit("rcnn", roi.test_cfg), "detections")


def _limit(stage: str, test_cfg: Any) -> int:
    limit = test_cfg.max_per_img
    if not isinstance(limit, int) or limit < 1:
        raise ConfigError(
            f"config key detector.overrides.test_cfg.{stage}.max_per_img",
            value=limit,
            rule="heads cost what the limit lets through: it must be at least 1",
        )
    return limit


def _roi_part(name: str, head: nn.Module, extractor: nn.Module, num_rois: int, what: str) -> PartCount:
    stages = list(zip(_stages(head), _stages(extractor), strict=True))
    # At evaluation every stage of a cascade works on every RoI, and masks are means over stages.
    macs = sum(num_rois * _macs_per_roi(stage, pool) for stage, pool in stages)
    note = f"at most {num_rois} {what}" + (f", {len(stages)} stages" if len(stages) > 1 else "")
    return PartCount(name, num_parameters(head), macs, note=note)


def _stages(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _macs_per_roi(head: nn.Module, extractor: Any) -> int:
    size = extractor.roi_layers[0].output_size
    return layer_macs(head, torch.empty(1, extractor.out_channels, *size, device="meta"))[1]


def _dino_parts(detector: Any, levels: Sequence[Tensor]) -> Iterator[PartCount]:
    tokens, queries = sum(level.shape[-2:].numel() for level in levels), detector.num_queries
    # The last of the head's branches scores the encoder's tokens, the others follow the decoder's layers.
    *labels, first_labels = detector.bbox_head.cls_branches
    *boxes, first_boxes = detector.bbox_head.reg_branches
    yield _encoder_part(detector.encoder, tokens)
    selection = nn.ModuleList([detector.memory_trans_fc, detector.memory_trans_norm, first_labels, first_boxes])
    embedded = nn.ModuleList([detector.query_embedding, detector.dn_query_generator])
    parameters = num_parameters(selection) + num_parameters(embedded) + detector.level_embed.numel()
    yield PartCount("query selection", parameters, linear_macs(selection, tokens), note=f"{tokens} tokens")
    yield _decoder_part(detector.decoder, queries, tokens)
    # Boxes are computed twice: to refine the references of the next layer, and as what this one predicts.
    macs = linear_macs(nn.ModuleList(labels), queries) + 2 * linear_macs(nn.ModuleList(boxes), queries)
    note = f"{queries} queries after each of {len(labels)} layers"
    yield PartCount("box head", num_parameters(nn.ModuleList([*labels, *boxes])), macs, note=note)


def _encoder_part(encoder: Any, tokens: int) -> PartCount:
    sampling = sum(_sampling_macs(layer.self_attn, tokens) for layer in encoder.layers)
    return PartCount("encoder", num_parameters(encoder), linear_macs(encoder, tokens), sampling, f"{tokens} tokens")


def _decoder_part(decoder: Any, queries: int, tokens: int) -> PartCount:
    macs = sum(_decoder_layer_macs(layer, queries, tokens) for layer in decoder.layers)
    macs += len(decoder.layers) * linear_macs(decoder.ref_point_head, queries)
    sampling = sum(_sampling_macs(layer.cross_attn, queries) for layer in decoder.layers)
    return PartCount("decoder", num_parameters(decoder), macs, sampling, f"{queries} queries")


def _decoder_layer_macs(layer: Any, queries: int, tokens: int) -> int:
    attention, cross = layer.self_attn.attn, layer.cross_attn
    # torch's module keeps the projections to queries, keys and values in one matrix, outside of any linear layer.
    among = queries * (attention.in_proj_weight.numel() + attention.out_proj.weight.numel())
    among += 2 * queries**2 * int(attention.embed_dim)
    values = (tokens - queries) * cross.value_proj.weight.numel()
    return int(among + linear_macs(cross, queries) + values + linear_macs(layer.ffn, queries))


def _sampling_macs(attention: Any, queries: int) -> int:
    points = attention.num_levels * attention.num_points
    return int(MACS_PER_SAMPLE * queries * points * attention.value_proj.out_features)
