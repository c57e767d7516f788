"""What a plan says that a DINO's layers hold, against what they do hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sections.subject import detector_config
from torch import Tensor, nn

from piip_scale.models.saved_activations import HeadBytes, bytes_both_ways
from piip_scale.tasks.detection.memory import layer_bytes
from piip_scale.tasks.detection.model import build_detection_model

BATCH, QUERIES = 2, 240
SIZES = torch.tensor([[16, 16], [8, 8], [4, 4], [2, 2]])
STARTS = torch.tensor([0, 256, 320, 336])
TOKENS = 340


class Called(nn.Module):
    """A layer of queries alone."""

    def __init__(self, layer: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, queries: Tensor) -> Tensor:
        return self.call(queries)


@pytest.fixture(scope="module")
def detector():
    return build_detection_model(detector_config("dino"), 3).train().heads.detector


@pytest.fixture(params=["cpu", "cuda"])
def device_type(request, monkeypatch):
    """``cuda``: what the kernel keeps, by the function that calls it there."""
    from mmcv.ops import multi_scale_deform_attn as mmcv_attention  # what it needs is there when models are

    def kept_as_on_a_gpu(value: Tensor, sizes: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        found: Tensor = mmcv_attention.MultiScaleDeformableAttnFunction.apply(value, sizes, STARTS, places, weights, 64)
        return found

    if request.param == "cuda":
        monkeypatch.setattr(mmcv_attention, "multi_scale_deformable_attn_pytorch", kept_as_on_a_gpu)
    return request.param


def held(layer: nn.Module, queries: Tensor, call: Callable[[Tensor], Tensor]) -> HeadBytes:
    """Of the call, with the queries themselves and without weights."""
    found = bytes_both_ways(Called(layer, call), queries)
    others = queries.nbytes - sum(parameter.nbytes for parameter in layer.parameters())
    return HeadBytes(found.kept + others, found.most + others)


def assert_held(found: HeadBytes, planned: HeadBytes, device_type: str) -> None:
    assert planned.kept == pytest.approx(found.kept, rel=0.03)
    if device_type == "cpu":  # the kernel's stand-in samples on its way back, as the kernel does not
        assert planned.most == pytest.approx(found.most, rel=0.03)
    else:
        assert planned.kept < planned.most < found.most


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, requires_grad=True)


def test_an_encoder_layer_holds_what_was_planned(detector, device_type):
    layer = detector.encoder.layers[0]
    width, levels = layer.self_attn.embed_dims, layer.self_attn.num_levels
    known = {"key_padding_mask": None, "spatial_shapes": SIZES, "level_start_index": STARTS, "valid_ratios": None}
    known |= {"query_pos": drawn(BATCH, TOKENS, width), "reference_points": torch.rand(BATCH, TOKENS, levels, 2)}
    found = held(layer, drawn(BATCH, TOKENS, width), lambda queries: layer(query=queries, **known))
    assert_held(found, layer_bytes(layer, BATCH * TOKENS, device_type), device_type)


def test_a_decoder_layer_holds_what_was_planned_and_what_queries_look_at(detector, device_type):
    layer = detector.decoder.layers[0]
    width, levels = layer.cross_attn.embed_dims, layer.cross_attn.num_levels
    known = {"key_padding_mask": None, "spatial_shapes": SIZES, "level_start_index": STARTS, "valid_ratios": None}
    known |= {"query_pos": drawn(BATCH, QUERIES, width), "value": drawn(BATCH, TOKENS, width)}
    known |= {"reference_points": torch.rand(BATCH, QUERIES, levels, 4), "self_attn_mask": None}
    found = held(layer, drawn(BATCH, QUERIES, width), lambda queries: layer(queries, **known))
    planned = layer_bytes(layer, BATCH * QUERIES, device_type)
    others = 4 * BATCH * (layer.self_attn.attn.num_heads * QUERIES**2 + TOKENS * width)
    assert_held(found, HeadBytes(planned.kept + others, planned.most + others), device_type)
