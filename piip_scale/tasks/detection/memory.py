"""What mmdet's necks and heads keep for their backward pass: run on the meta device, or estimated where data decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from piip_scale.config.detection import DetectionRun
from piip_scale.models.saved_activations import HeadBytes, bytes_both_ways, bytes_in_turn, saved_for_backward
from piip_scale.tasks.base import Outline
from piip_scale.tasks.detection.model import DetectionHeads, build_detection_model
from piip_scale.tasks.heads import outline_with_heads

_FLOAT_BYTES = 4
# Denoising queries of a DINO beside the matched ones, at mmdet's own dn_cfg.
DENOISING_QUERIES = 200


def outline_detector(config: DetectionRun, num_classes: int, images_BCHW: Tensor, device_type: str) -> Outline:
    """What planning a detector's memory needs; see ``tasks.outline``."""
    model = build_detection_model(config, num_classes)
    of_heads = partial(head_bytes, model.heads, device_type=device_type)
    return outline_with_heads(model, config.train.precision, images_BCHW, of_heads)


def head_bytes(heads: DetectionHeads, features: Sequence[Tensor], device_type: str = "cuda") -> HeadBytes:
    """What one micro-batch's losses keep alive in neck and heads, in float32, weights that are cast included.

    Convolutions and fully connected layers are run on the meta device: an R-CNN's RoI heads on as many proposals as
    its samplers draw, all of them and a full share of positive ones. A DINO's encoder and decoder are counted by
    layer. Targets, anchors and the losses themselves are left out.

    Args:
        heads: On the meta device, in training mode.
        features: What the network offers for a micro-batch, on the meta device.
        device_type: Where they will run: on a ``cpu`` mmcv's deformable attention keeps every sampled value.
    """
    taken = tuple(features[index].float() for index in heads.feature_indices)
    levels, kept = saved_for_backward(heads.detector.neck, taken)
    rule = _rcnn_bytes if hasattr(heads.detector, "roi_head") else partial(_dino_bytes, device_type=device_type)
    return bytes_in_turn([_only_kept(kept), *rule(heads.detector, levels)])


def _only_kept(num_bytes: int) -> HeadBytes:
    return HeadBytes(num_bytes, num_bytes)


def _rcnn_bytes(detector: Any, levels: Sequence[Tensor]) -> Iterator[HeadBytes]:
    roi, batch = detector.roi_head, levels[0].shape[0]
    yield _only_kept(sum(level.nbytes for level in levels))
    yield _only_kept(saved_for_backward(detector.rpn_head, tuple(levels))[1])
    stages = roi.train_cfg if isinstance(roi.train_cfg, list | tuple) else [roi.train_cfg]
    for index, settings in enumerate(stages):
        rois = batch * min(settings.sampler.num, detector.train_cfg.rpn_proposal.max_per_img)
        yield _roi_bytes(_stage(roi.bbox_head, index), _stage(roi.bbox_roi_extractor, index), rois)
        if roi.with_mask:
            positive = int(rois * settings.sampler.pos_fraction)
            yield _roi_bytes(_stage(roi.mask_head, index), _stage(roi.mask_roi_extractor, index), positive)


def _stage(module: nn.Module, index: int) -> Any:
    return module[index] if isinstance(module, nn.ModuleList) else module


def _roi_bytes(head: nn.Module, extractor: Any, num_rois: int) -> HeadBytes:
    size = extractor.roi_layers[0].output_size
    pooled = torch.empty(num_rois, extractor.out_channels, *size, device="meta", requires_grad=True)
    return bytes_in_turn([_only_kept(pooled.nbytes), bytes_both_ways(head, pooled)])


def _dino_bytes(detector: Any, levels: Sequence[Tensor], device_type: str) -> Iterator[HeadBytes]:
    batch, tokens = levels[0].shape[0], sum(level.shape[-2:].numel() for level in levels)
    queries = detector.num_queries + DENOISING_QUERIES
    # Weights are cast before anything else is there.
    yield _only_kept(_FLOAT_BYTES * sum(parameter.numel() for parameter in detector.parameters()))
    yield _only_kept(sum(level.nbytes for level in levels))
    for layer in detector.encoder.layers:
        yield layer_bytes(layer, batch * tokens, device_type)
    # Every token proposes a box: by a projection and its norm, and two hidden layers.
    yield _only_kept(batch * tokens * 5 * detector.embed_dims * _FLOAT_BYTES)
    for layer in detector.decoder.layers:
        among = layer.self_attn.attn.num_heads * queries**2
        yield _only_kept(batch * (among + tokens * detector.embed_dims) * _FLOAT_BYTES)
        yield layer_bytes(layer, batch * queries, device_type)


def layer_bytes(layer: Any, num_queries: int, device_type: str) -> HeadBytes:
    """What a DINO's layer holds of queries alone: without weights, and what they look at or each other.

    Args:
        layer: Of encoder or decoder.
        num_queries: Of all images; an encoder's are the tokens.
        device_type: Where it will run.
    """
    decodes, on_cpu = hasattr(layer, "cross_attn"), device_type == "cpu"
    attention = layer.cross_attn if decodes else layer.self_attn
    width, hidden = attention.embed_dims, layer.ffn.layers[0][0].out_features
    samples = attention.num_heads * attention.num_levels * attention.num_points
    # mmcv's formula for CPUs keeps what it samples, and weights a second time; the kernel locations and weights.
    sampled = width * attention.num_levels * attention.num_points * on_cpu
    kept = (15 if decodes else 7) * width + (3 + on_cpu) * samples + hidden + sampled
    # Two gradients as wide as the hidden layer, or as what was sampled, are there at once.
    back = max(2 * hidden + width, 2 * sampled + 2 * width + samples)
    return HeadBytes(_FLOAT_BYTES * num_queries * kept, _FLOAT_BYTES * num_queries * (kept + back))
