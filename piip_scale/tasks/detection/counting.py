"""What mmdet's necks and heads weigh, and what they cost for one image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from piip_scale.config.detection import DetectionRun, DetectorConfig
from piip_scale.errors import ConfigError
from piip_scale.models.branch import FeatureSpec
from piip_scale.models.counting import PartCount, feature_maps, part_count
from piip_scale.models.network_work import MACS_PER_SAMPLE
from piip_scale.models.work import Work, layer, product, total
from piip_scale.tasks.counting import PyramidCounting
from piip_scale.tasks.detection.few_waits_dino import FewWaitsDINO
from piip_scale.tasks.detection.memory import DENOISING_QUERIES
from piip_scale.tasks.detection.model import DetectionHeads
from piip_scale.tasks.layer_work import layer_work, linear_work

_ROI_HEADS = ("StandardRoIHead", "CascadeRoIHead")
_Rule = Callable[[Any, Sequence[Tensor], bool], Iterator[PartCount]]


@dataclass(frozen=True)
class DetectionCounting(PyramidCounting):
    """The count of a detector: a ``Counting``."""

    config: DetectionRun

    def heads(self, height_px: int, width_px: int, *, training: bool) -> tuple[PartCount, ...]:
        """See ``Counting.heads``."""
        features = feature_maps(self.config.model, height_px, width_px)
        return detector_parts(self.config.detector, features, self.num_classes, training)


def detector_parts(
    config: DetectorConfig, features: Sequence[tuple[FeatureSpec, Tensor]], num_classes: int, training: bool = False
) -> tuple[PartCount, ...]:
    """Counts neck and heads. Norms, activations, RoIAlign and NMS are no multiply-accumulates of layers: left out.

    Args:
        config: Kind and overrides.
        features: What the network offers, see ``models.counting.feature_maps``.
        num_classes: Classes without background.
        training: Count a training step and its backward pass: RoI heads on as many boxes as their samplers draw, all
            of them and a full share of positive ones; DINO with its denoising queries.

    Returns:
        The neck, then of R-CNNs RPN, box head and perhaps mask head, at evaluation with as many proposals and
        detections as the detector's ``test_cfg`` lets through; of DINO encoder, query selection, decoder and box head.

    Raises:
        ConfigError: Overrides that mmdet does not know, or heads that no rule here counts.
    """
    with torch.device("meta"):
        heads = DetectionHeads(config, [spec for spec, _ in features], num_classes).eval()
    detector: Any = heads.detector
    levels, work = layer_work(detector.neck, tuple(features[index][1] for index in heads.feature_indices))
    neck = part_count("neck", detector.neck, work, note=f"{len(levels)} levels", training=training)
    return (neck, *_rule_of(detector)(detector, levels, training))


def _rule_of(detector: Any) -> _Rule:
    name = type(getattr(detector, "roi_head", detector)).__name__
    if name in _ROI_HEADS:
        return _rcnn_parts
    if type(detector) is FewWaitsDINO:
        return _dino_parts
    rule = f"there are rules for DINO, {' and '.join(_ROI_HEADS)}"
    raise ConfigError("heads cannot be counted", value=name, rule=rule)


def _rcnn_parts(detector: Any, levels: Sequence[Tensor], training: bool) -> Iterator[PartCount]:
    rpn, roi = detector.rpn_head, detector.roi_head
    yield part_count("rpn", rpn, layer_work(rpn, levels)[1], training=training)
    stages = _sampled if training else _limited
    box = stages(detector, "rpn", "proposals")
    yield _roi_part("box head", roi.bbox_head, roi.bbox_roi_extractor, *box, training)
    if roi.with_mask:
        mask = stages(detector, "rcnn", "detections")
        yield _roi_part("mask head", roi.mask_head, roi.mask_roi_extractor, *mask, training)


def _limited(detector: Any, stage: str, what: str) -> tuple[list[int], str]:
    """Boxes of each stage's head at evaluation, and what they are called."""
    test_cfg = detector.rpn_head.test_cfg if stage == "rpn" else detector.roi_head.test_cfg
    limit = test_cfg.max_per_img
    if not isinstance(limit, int) or limit < 1:
        raise ConfigError(
            f"config key detector.overrides.test_cfg.{stage}.max_per_img",
            value=limit,
            rule="heads cost what the limit lets through: it must be at least 1",
        )
    # Every stage of a cascade works on every RoI, and masks are means over stages.
    return [limit] * len(_stages(detector.roi_head.bbox_head)), f"at most {limit} {what}"


def _sampled(detector: Any, stage: str, _: str) -> tuple[list[int], str]:
    """Boxes of each stage's head in training, and what they are called."""
    settings = detector.roi_head.train_cfg
    samplers = [one.sampler for one in (settings if isinstance(settings, list | tuple) else [settings])]
    if stage == "rpn":
        return [sampler.num for sampler in samplers], f"at most {samplers[0].num} sampled boxes"
    positive = [int(sampler.num * sampler.pos_fraction) for sampler in samplers]
    return positive, f"at most {positive[0]} sampled objects"


def _roi_part(
    name: str, head: nn.Module, extractor: nn.Module, num_rois: Sequence[int], note: str, training: bool
) -> PartCount:
    stages = zip(_stages(head), _stages(extractor), num_rois, strict=True)
    work = total(_of_rois(stage, pool, rois) for stage, pool, rois in stages)
    note += f", {len(num_rois)} stages" if len(num_rois) > 1 else ""
    return part_count(name, head, work, note=note, training=training)


def _stages(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _of_rois(head: nn.Module, extractor: Any, num_rois: int) -> Work:
    size = extractor.roi_layers[0].output_size
    pooled = torch.empty(1, extractor.out_channels, *size, device="meta", requires_grad=True)
    work = layer_work(head, pooled)[1]
    return Work(num_rois * work.forward, num_rois * work.backward)


def _dino_parts(detector: Any, levels: Sequence[Tensor], training: bool) -> Iterator[PartCount]:
    tokens = sum(level.shape[-2:].numel() for level in levels)
    queries = detector.num_queries + (DENOISING_QUERIES if training else 0)
    counted = partial(part_count, training=training)
    # The last of the head's branches scores the encoder's tokens, the others follow the decoder's layers.
    *labels, first_labels = detector.bbox_head.cls_branches
    *boxes, first_boxes = detector.bbox_head.reg_branches
    sampling = total(_sampling(encoder_layer.self_attn, tokens) for encoder_layer in detector.encoder.layers)
    yield counted("encoder", detector.encoder, linear_work(detector.encoder, tokens), sampling, f"{tokens} tokens")
    selection = nn.ModuleList([detector.memory_trans_fc, detector.memory_trans_norm, first_labels, first_boxes])
    embedded = nn.ModuleList([detector.query_embedding, detector.dn_query_generator])
    weights = nn.ParameterList([*selection.parameters(), *embedded.parameters(), detector.level_embed])
    yield counted("query selection", weights, linear_work(selection, tokens), note=f"{tokens} tokens")
    decoding = _decoding(detector.decoder, queries, tokens)
    yield counted("decoder", detector.decoder, *decoding, f"{queries} queries")
    # Boxes are computed twice: to refine the references of the next layer, and as what this one predicts.
    refined = linear_work(nn.ModuleList(boxes), queries)
    work = linear_work(nn.ModuleList(labels), queries) + refined + refined
    note = f"{queries} queries after each of {len(labels)} layers"
    yield counted("box head", nn.ModuleList([*labels, *boxes]), work, note=note)


def _decoding(decoder: Any, queries: int, tokens: int) -> tuple[Work, Work]:
    work = total(_decoder_layer(decoder_layer, queries, tokens) for decoder_layer in decoder.layers)
    work += total(linear_work(decoder.ref_point_head, queries) for _ in decoder.layers)
    return work, total(_sampling(decoder_layer.cross_attn, queries) for decoder_layer in decoder.layers)


def _decoder_layer(decoder_layer: Any, queries: int, tokens: int) -> Work:
    attention, cross = decoder_layer.self_attn.attn, decoder_layer.cross_attn
    # torch's module keeps the projections to queries, keys and values in one matrix, outside of any linear layer.
    among = layer(queries * (attention.in_proj_weight.numel() + attention.out_proj.weight.numel()))
    among += product(2 * queries**2 * int(attention.embed_dim))
    values = layer((tokens - queries) * cross.value_proj.weight.numel())
    return among + linear_work(cross, queries) + values + linear_work(decoder_layer.ffn, queries)


def _sampling(attention: Any, queries: int) -> Work:
    points = attention.num_levels * attention.num_points
    return product(int(MACS_PER_SAMPLE * queries * points * attention.value_proj.out_features))
