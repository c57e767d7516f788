"""timm's own models with random weights, as a check that is independent of the released PIIP code."""

import pytest
import torch
from timm.models.convnext import ConvNeXt as TimmConvNext
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from piip_scale.config.branches import ConvNextBranchConfig, VitBranchConfig
from piip_scale.config.model import AUTO_KERNELS
from piip_scale.geometry import section_at
from piip_scale.models.convnext import ConvNext
from piip_scale.models.vit import Attention, Vit

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
NUMBERS = {"embed_dim": 48, "depth": 3, "num_heads": 4}


def randomise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def image(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(6))


def translate(theirs: nn.Module, renames: dict[str, str]) -> dict[str, torch.Tensor]:
    translated = {}
    for name, value in theirs.state_dict().items():
        for old, new in renames.items():
            name = name.replace(old, new)
        translated[name] = value
    return translated


VIT_NAMES = {"patch_embed.proj": "embedding.proj", "pos_embed": "embedding.position", "cls_token": "class_token.token"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),  # MAE, AugReg
        ({"init_values": 0.5}, {"layer_scale_init": 0.5}),  # DeiT III, DINOv2
        ({"class_token": True, "no_embed_class": True, "init_values": 1.0}, {"class_token": True}),
        ({"qkv_bias": False, "mlp_ratio": 2.0}, {"qkv_bias": False, "mlp_ratio": 2.0}),
        ({"patch_size": 14, "img_size": 56}, {"patch_size_px": 14, "pretrain_resolution_px": 56}),
    ],
)
def test_plain_transformers(theirs, ours):
    size = {"img_size": 64, "patch_size": 16} | {k: theirs[k] for k in ("img_size", "patch_size") if k in theirs}
    timm_numbers = {"class_token": False, "global_pool": "", "num_classes": 0} | NUMBERS | size | theirs
    their_model = randomise(VisionTransformer(**timm_numbers))
    numbers = {"resolution_px": 64, "pretrain_resolution_px": 64} | NUMBERS | ours
    if "init_values" in theirs:
        numbers["layer_scale_init"] = theirs["init_values"]
    model = Vit(VitBranchConfig(**numbers)).eval()
    weights = translate(their_model, VIT_NAMES)
    final_norm = {name: weights.pop(name) for name in ("norm.weight", "norm.bias")}
    model.load_state_dict(weights)

    state = model.run(model.embed(image(size["img_size"])), 0, NUMBERS["depth"])
    tokens = state.grid_BHWC.flatten(1, 2)
    if state.class_token_B1C is not None:
        tokens = torch.cat((state.class_token_B1C, tokens), 1)
    tokens = nn.functional.layer_norm(tokens, (48,), final_norm["norm.weight"], final_norm["norm.bias"], eps=1e-6)
    torch.testing.assert_close(tokens, their_model.forward_features(image(size["img_size"])), **TOLERANCE)


def test_windows_with_a_relative_position_bias():
    """BEiT's blocks, by Swin's windowed attention, whose table counts distances in the same order."""
    window, dim, heads = 3, 24, 4
    theirs = randomise(WindowAttention(dim, heads, window_size=window))
    config = VitBranchConfig(
        resolution_px=64,
        embed_dim=dim,
        depth=1,
        num_heads=heads,
        key_bias=False,
        relative_position_bias=True,
        window_size_tokens=(window,),
    )
    ours = Attention(config, 0, AUTO_KERNELS).eval()
    weights = theirs.state_dict()
    query, key, value = weights["qkv.bias"].chunk(3)
    # A bias for keys adds the same to all of a query's scores: leaving it out changes nothing.
    assert key.abs().min() > 0
    ours.load_state_dict(
        {
            "qkv.weight": weights["qkv.weight"],
            "qv_bias.query": query,
            "qv_bias.value": value,
            "position_bias.table": weights["relative_position_bias_table"],
            "proj.weight": weights["proj.weight"],
            "proj.bias": weights["proj.bias"],
        }
    )
    tokens = torch.randn(2, window * window, dim)
    torch.testing.assert_close(ours(tokens, window, window), theirs(tokens), **TOLERANCE)


def test_convnext_stage_by_stage():
    depths, widths = (2, 1, 3, 1), (16, 24, 32, 48)
    theirs = randomise(TimmConvNext(depths=depths, dims=widths, num_classes=0))
    model = ConvNext(ConvNextBranchConfig(resolution_px=64, depths=depths, widths=widths)).eval()
    ends = [2, 4, 8, 10]
    renames = {"stem.0": "embedding.proj", "stem.1": "embedding.norm", "conv_dw": "dwconv", "gamma": "ls.gamma"}
    weights = {}
    for name, value in translate(theirs, renames).items():
        if name.startswith("stages."):
            _, stage, kind, *rest = name.split(".")
            first = ends[int(stage)] - depths[int(stage)]
            if kind == "downsample":
                name = f"blocks.{first - 1}.{'norm' if rest[0] == '0' else 'proj'}.{rest[1]}"
            else:
                name = f"blocks.{first + int(rest[0])}.{'.'.join(rest[1:])}"
        weights[name] = value
    model.load_state_dict({name: value for name, value in weights.items() if not name.startswith("head.")})

    expected = theirs.forward_intermediates(image(64), intermediates_only=True)
    state, first = model.embed(image(64)), 0
    for last, truth in zip(ends, expected, strict=True):
        state = model.run(state, first, last)
        torch.testing.assert_close(state.grid_BHWC.permute(0, 3, 1, 2), truth, **TOLERANCE)
        section = section_at(model.config.sections, last - 1)
        assert section.width == truth.shape[1]
        assert section.stride_px == 64 // truth.shape[2]
        first = last


def test_convnext_drop_path_rises_over_its_blocks_as_timm_has_it():
    depths = (2, 1, 3, 1)
    theirs = TimmConvNext(depths=depths, dims=(8, 8, 8, 8), drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in theirs.stages for block in stage.blocks]
    numbers = {"resolution_px": 64, "depths": depths, "widths": (8, 8, 8, 8), "drop_path_rate": 0.3}
    ours = ConvNext(ConvNextBranchConfig(**numbers))
    assert [b.drop_path.rate for b in ours.blocks if hasattr(b, "drop_path")] == pytest.approx(rates)
