import json

import pytest
import torch

from piip_scale.errors import ConfigError, ModelError
from piip_scale.models.classifier import PiipClassifier
from piip_scale.models.official import from_official
from piip_scale.models.official_config import read_official_config
from piip_scale.models.official_keys import official_name
from piip_scale.models.piip import PIIP
from piip_scale.models.released import released_name, released_network

VIT = {"depth": 2, "num_heads": 4, "qkv_bias": True, "pretrain_img_size": 32, "interaction_indexes": [[0, 0], [1, 1]]}
NETWORK = {
    "type": "PIIPTwoBranch",
    "deform_num_heads": 4,
    "with_cffn": True,
    "deform_ratio": 0.5,
    "branch1": VIT | {"embed_dim": 64, "real_size": 32, "pretrained": "deit_base.pth"},
    "branch2": VIT | {"embed_dim": 32, "real_size": 64, "pretrained": "deit_small.pth"},
}
UNUSED_IN_DINO = {  # fpn1, which only the released three-branch class builds for DINO and never calls
    "dino_4scale_deit_384_sbl_1792_1120_672_fpn_3x_coco_bs32_ms.py": 2 * (4 * 1024**2 + 1024) + 2 * 1024,
    "dino_4scale_internvit_lh6b_1536_1024_512_fpn_2x_coco_bs32_ms.py": 2 * (4 * 3200**2 + 3200) + 2 * 3200,
}


def official_weights(backbone: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    official = read_official_config(backbone)
    state = from_official(backbone).state_dict()
    return {official_name(name, official): torch.randn_like(tensor) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def released_models(released_backbones):
    with torch.device("meta"):
        return {path: from_official(backbone) for path, backbone in released_backbones.items()}


def test_parameter_counts_are_the_released_ones_part_by_part(reference, released_models):
    counts = json.loads((reference / "official_parameter_counts.json").read_text())
    assert len(counts) == 25
    for path, count in counts.items():
        model = released_models[path]
        unused = UNUSED_IN_DINO.get(path.rsplit("/", 1)[-1], 0)
        assert sum(p.numel() for p in model.parameters()) + unused == count["total"], path
        parts = {f"branch{i + 1}": branch for i, branch in enumerate(model.branches)}
        if len(parts) == 1:
            continue
        parts |= {"interactions": model.interactions, "merging": model.mergings, "pyramid": model.pyramid}
        for name, module in parts.items():
            expected = count["parts"][name] - (unused if name == "pyramid" else 0)
            assert sum(p.numel() for p in module.parameters()) == expected, (path, name)


def test_every_released_config_is_understood(released_backbones, released_models):
    assert len(released_models) == 41
    for path, backbone in released_backbones.items():
        model = released_models[path]
        assert isinstance(model, PiipClassifier if path.startswith("classification") else PIIP)
        if isinstance(model, PIIP):
            strides = (8, 16, 32) if backbone.get("is_dino") else (4, 8, 16, 32)
            assert tuple(spec.stride_px for spec in model.feature_specs) == strides, path


def test_official_names_are_unique(released_backbones, released_models):
    for path, backbone in released_backbones.items():
        model = released_models[path]
        official, named_by_ours = read_official_config(backbone), released_network(model.config)
        assert named_by_ours.unused == official.unused, path
        names = [official_name(name, official) for name in model.state_dict()]
        assert len(set(names)) == len(names), path
        assert [released_name(name, named_by_ours) for name in model.state_dict()] == names, path


def test_uni_perceiver_and_baseline_names(released_backbones, released_models):
    def names(part: str) -> set[str]:
        path = next(path for path in released_backbones if part in path)
        official = read_official_config(released_backbones[path])
        return {official_name(name, official) for name in released_models[path].state_dict()}

    perceiver = names("uniperceiver")
    assert {
        "branch1.visual_embed.patch_embed.spatial_pos_embed.weight",
        "branch1.visual_embed.patch_embed.temporal_pos_embed.weight",
        "branch1.visual_embed.embeddings_norm.weight",
        "branch1.layers.23.self_attn.in_proj.weight",
        "branch1.layers.0.self_attn.out_proj.bias",
        "branch2.layers.3.linear2.weight",
        "branch2.layers.3.gamma_1",
    } <= perceiver
    baseline = names("baseline/mask_rcnn_deit_vit_b")
    assert {"pos_embed", "patch_embed.proj.weight", "blocks.11.gamma_2", "up1.1.weight", "up2.0.bias"} <= baseline


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "meta": {"epoch": 12}},
        lambda weights: {"module": {f"backbone.{key}": value for key, value in weights.items()}},
        lambda weights: {f"backbone.{k}": v for k, v in weights.items()} | {"neck.conv.weight": torch.zeros(1)},
    ],
)
def test_weights_are_found_however_they_are_wrapped(wrap):
    weights = official_weights(NETWORK)
    model = from_official(NETWORK, wrap(weights))
    assert torch.equal(model.branches[0].blocks[1].ls2.gamma, weights["branch1.blocks.1.gamma_2"])
    assert not model.training


def test_every_key_is_accounted_for():
    weights = official_weights(NETWORK)
    del weights["branch1.blocks.0.attn.qkv.weight"]
    weights["branch2.blocks.0.norm1.bias"] = torch.zeros(7)
    weights["branch3.pos_embed"] = torch.zeros(1)
    with pytest.raises(ModelError) as raised:
        from_official(NETWORK, weights)
    line = str(raised.value)
    assert "missing branch1.blocks.0.attn.qkv.weight" in line
    assert "branch2.blocks.0.norm1.bias has shape [7], expected [32]" in line
    assert "unexpected branch3.pos_embed" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"interact_atn_type": "deform"}, "unknown keys in backbone: got ['interact_atn_type']"),
        ({"branch1": NETWORK["branch1"] | {"depht": 3}}, "unknown keys in branch1: got ['depht']"),
        ({"branch1": NETWORK["branch1"] | {"drop_rate": 0.1}}, "branch1.drop_rate: got 0.1; only 0 is supported"),
        ({"branch1": NETWORK["branch1"] | {"use_simple_fpn": False}}, "branch1.use_simple_fpn: got False"),
        ({"branch1": NETWORK["branch1"] | {"interaction_indexes": [[0, 0]]}}, "does not fit"),
        ({"branch1": NETWORK["branch1"] | {"interaction_indexes": [[0, 0], [2, 2]]}}, "no block is left out"),
        ({"branch1": NETWORK["branch1"] | {"window_attn": True}}, "pads after qkv"),
        ({"branch1": {"embed_dim": 64}}, "branch1 has no"),
        ({"deform_num_heads": 7}, "num_heads=7 must divide"),
    ],
)
def test_a_config_that_is_not_understood_is_one_line(change, part):
    with pytest.raises(ConfigError) as raised:
        from_official(NETWORK | change)
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_single_class_is_named():
    with pytest.raises(ConfigError, match=r"type: got 'ResNet'; one of vit_models, InternViT6B"):
        from_official({"type": "ResNet"})


@pytest.mark.parametrize(
    ("backbone", "part"),
    [
        ({"type": "vit_models", "with_simple_fpn": False}, "unknown keys in backbone: got ['with_simple_fpn']"),
        ({"type": "vit_models", "with_fpn": True, "use_simple_fpn": False}, "only True is supported"),
        ({"type": "ConvNextHFWrapper", "pretrained": "base", "with_simple_fpn": True}, "levels of its own"),
    ],
)
def test_pyramids_that_no_single_class_has_are_refused(backbone, part):
    with pytest.raises(ConfigError) as raised:
        read_official_config(backbone | {"real_size": 64})
    assert part in raised.value.line


def test_the_four_branch_class_builds_its_last_branch_from_the_third():
    four = NETWORK | {
        "type": "PIIPFourBranch",
        "branch3": VIT | {"embed_dim": 32, "real_size": 96, "pretrained": "deit_small.pth"},
        "branch4": VIT | {"embed_dim": 16, "real_size": 128, "pretrained": "deit_tiny.pth"},
    }
    model = from_official(four)
    assert [branch.embed_dim for branch in model.config.branches] == [64, 32, 32, 32]
    assert [branch.resolution_px for branch in model.config.branches] == [32, 64, 96, 128]


@pytest.mark.parametrize("separate", [True, False])
def test_classifiers_run_and_use_every_parameter(separate):
    sizes = {1: (64, 32), 2: (32, 48), 3: (32, 64)}
    own = {"init_scale": 1.0, "drop_path_rate": 0.0, "use_cls_token": True}
    branches = {f"branch{i}": VIT | own | {"embed_dim": d, "img_size": s} for i, (d, s) in sizes.items()}
    network = {k: v for k, v in NETWORK.items() if not k.startswith("branch") and k != "type"}
    model = from_official(network | branches | {"separate_head": separate, "num_classes": 10})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    logits = model(torch.randn(2, 3, 64, 64))
    # Separate heads keep the branches' default of 1000 classes, whatever the network says.
    assert logits.shape == (2, 1000 if separate else 10)
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
