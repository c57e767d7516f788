"""Whatever valid network one writes down: it builds, and what it declares is what comes out."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piip_scale.config.model import PiipConfig
from piip_scale.models.counting import count_network
from piip_scale.models.piip import PIIP

CPU_SECONDS = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def vit(draw, resolution: int, dim: int, stages: int):
    blocks = draw(st.lists(st.integers(1, 2), min_size=stages, max_size=stages))
    depth = sum(blocks)
    return {
        "resolution_px": resolution,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": draw(st.sampled_from([1, 2, 4])),
        "patch_size_px": draw(st.sampled_from([8, 16])),
        "pretrain_resolution_px": draw(st.sampled_from([16, 48])),
        "blocks_per_stage": tuple(blocks),
        "window_size_tokens": tuple(draw(st.lists(st.integers(0, 4), min_size=depth, max_size=depth))),
        "norm": draw(st.sampled_from(["layernorm", "rmsnorm"])),
        "qk_norm": draw(st.sampled_from([True, False, "head"])),
        "rotary": draw(st.sampled_from([None, {"pairs": "neighbours", "coordinates": "cells"}, {"windows": "window"}])),
        "register_tokens": draw(st.integers(0, 2)),
        "class_token": draw(st.booleans()),
        "feed_forward": draw(st.sampled_from(["mlp", "swiglu"])),
        "position_resize": draw(st.sampled_from(["bicubic", "bilinear", "crop", "tile"])),
        "key_bias": draw(st.booleans()),
        "layer_scale_init": draw(st.sampled_from([None, 0.1])),
        "position_class_slot": draw(st.booleans()),
        "embedding_norm": draw(st.booleans()),
    }


@st.composite
def networks(draw):
    stages = draw(st.integers(1, 2))
    sizes = sorted(draw(st.lists(st.integers(32, 96), min_size=1, max_size=4)))
    dims = [64, *(draw(st.sampled_from([16, 32])) for _ in sizes[1:])]
    unit = {
        "num_stages": stages,
        "num_heads": 4,
        "num_points": draw(st.integers(1, 3)),
        "attention": draw(st.sampled_from(["deform", "cross"])),
        "ffn_ratio": draw(st.sampled_from([0.0, 0.25])),
        "projection": draw(st.booleans()),
        "direction": draw(st.sampled_from(["both", "to_small"])),
        "norm": draw(st.sampled_from(["layernorm", "none"])),
        "gamma_init": 0.1,
    }
    branches = tuple(draw(vit(size, dim, stages)) for size, dim in zip(sizes, dims, strict=True))
    return PiipConfig(branches=branches, interaction=unit, attention_kernel="math")


@CPU_SECONDS
@given(config=networks(), height=st.integers(64, 110), width=st.integers(64, 110))
def test_features_are_what_is_declared_for_any_network_and_image(config, height, width):
    torch.manual_seed(0)
    model = PIIP(config).eval()
    smallest = min(branch.resolution_px for branch in config.branches) / config.branches[-1].resolution_px
    # Every branch needs one patch: enlarge the image for a branch that sees very little of it.
    factor = max(1, -(-16 // int(64 * smallest)))
    height, width = height * factor, width * factor
    features = model(torch.randn(1, 3, height, width))
    patch = config.branches[-1].patch_size_px
    for feature, spec, scale in zip(features, model.feature_specs, config.pyramid.scales, strict=True):
        assert feature.shape == (1, 64, int(height // patch * scale), int(width // patch * scale))
        assert spec.stride_px * scale == patch
        assert torch.isfinite(feature).all()
    assert sum(p.parameters for p in count_network(config, height, width)) == sum(p.numel() for p in model.parameters())
    assert set(model.parameter_rules()) == {name for name, _ in model.named_parameters()}
