"""Files of foundation models: their owners', timm's and Hugging Face's give the same branches."""

import json
from argparse import Namespace

import pytest
import torch
from foundation import CASES, GRID, TOLERANCE, VIT, error, gradient, load, our_config, randomise
from safetensors.torch import save_file

from piip_scale.config.branches import ConvNextBranchConfig
from piip_scale.config.foundation_presets import FOUNDATION_PRESETS
from piip_scale.config.model import PiipConfig
from piip_scale.errors import ModelError
from piip_scale.models.convnext import ConvNext
from piip_scale.models.joined import Joined
from piip_scale.models.pretrained import branch_weights, check_pretrained
from piip_scale.models.vit import Vit

ORIGINALS = {
    "dinov3_s_plus": (
        ("reg_token", "storage_tokens"),
        ("gamma_", "ls"),
        ("fc1_g", "w1"),
        ("fc1_x", "w2"),
        ("mlp.fc2", "mlp.w3"),
    ),
    "eva02_l": (("fc1_g", "w1"), ("fc1_x", "w2"), ("mlp.fc2", "mlp.w3"), ("mlp.norm", "mlp.ffn_ln")),
    "pe_spatial_g": (
        ("patch_embed.proj", "visual.conv1"),
        ("pos_embed", "visual.positional_embedding"),
        ("norm_pre", "visual.ln_pre"),
        ("blocks.", "visual.transformer.resblocks."),
        (".norm", ".ln_"),
        ("gamma_", "ls_"),
        ("qkv.", "in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ),
}


@pytest.mark.parametrize("case", ORIGINALS)
def test_an_owners_file_is_the_one_that_timm_makes_of_it(tmp_path, case):
    from timm.models.eva import checkpoint_filter_fn

    model = CASES[case]((GRID, GRID))
    original = {}
    for name, value in randomise(model).state_dict().items():
        for old, new in ORIGINALS[case]:
            name = name.replace(old, new)
        if name.split(".")[-1].startswith("ls"):
            name += ".gamma"
        original[name] = value[0] if name == "visual.positional_embedding" else value.clone()
    if case.startswith("dinov3"):
        for block in range(VIT["depth"]):
            attention = f"blocks.{block}.attn."
            query, value = (original.pop(f"{attention}{part}_bias") for part in "qv")
            # What is masked is never used: their file has anything there.
            original[f"{attention}qkv.bias"] = torch.cat((query, torch.full_like(query, torch.nan), value))
            original[f"{attention}qkv.bias_mask"] = torch.ones(96)
        original |= {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.ones(4)}
    converted = {name: value.contiguous() for name, value in checkpoint_filter_fn(dict(original), model).items()}
    found = []
    for name, tensors in (("original", {"model": original}), ("timm", converted)):
        torch.save(tensors, tmp_path / f"{name}.pth")
        branch = Vit(our_config(case))
        found.append(branch_weights(branch, branch.config, tmp_path / f"{name}.pth"))
        assert found[-1].keys() == branch.state_dict().keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


RENAMES = {
    "sam3": (
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("layer_norm1", "norm1"),
        ("layer_norm2", "norm2"),
        ("layer_norm", "ln_pre"),
        ("layers.", "blocks."),
    ),
    "radio_v4_h": (
        ("embeddings.patch_projection", "patch_generator.embedder"),
        ("embeddings.position_embedding", "patch_generator.pos_embed"),
        ("embeddings.cls_register_token", "patch_generator.cls_token.token"),
        ("encoder.layer.", "blocks."),
    ),
}
SAM3 = "detector.backbone.vision_backbone."
BESIDE = {
    f"{SAM3}trunk.": {
        f"{SAM3}convs.0.conv_1x1.weight": torch.zeros(3),
        "detector.backbone.language_backbone.encoder.ln_final.weight": torch.zeros(3),
        "tracker.maskmem_tpos_enc": torch.zeros(3),
        **{f"{SAM3}trunk.blocks.{block}.attn.freqs_cis": torch.zeros(9, 8, dtype=torch.complex64) for block in (0, 1)},
    },
    "radio_model.model.": {
        "radio_model.summary_idxs": torch.zeros(2, dtype=torch.int64),
        "radio_model.input_conditioner.norm_mean": torch.zeros(3, 1, 1),
        "radio_model.adaptors.siglip2-g.head_mlp.fc1.weight": torch.zeros(3),
    },
    "base_model.": {
        "input_conditioner.norm_mean": torch.zeros(3, 1, 1),
        "_heads.0.fc1.weight": torch.zeros(3),
        "_feature_normalizer.mean": torch.zeros(3),
    },
}
"""What the repositories' files have beside the backbone, by what they call that: none of it is used."""


@pytest.mark.parametrize(
    ("case", "wrapper"),
    [("sam3", f"{SAM3}trunk."), ("radio_v4_h", "radio_model.model."), ("radio_v4_h", "base_model.")],
)
def test_originals_of_sam_and_radio_are_those_of_transformers(tmp_path, case, wrapper):
    weights = randomise(CASES[case]((GRID, GRID))).state_dict()
    original = dict(BESIDE[wrapper])
    for name, value in weights.items():
        if "layer_scale" in name or name.startswith(("input_conditioner", "summary")):
            continue
        for old, new in (*RENAMES[case], (".attention.", ".attn."), ("o_proj", "proj")):
            name = name.replace(old, new)
        original[wrapper + name] = value
    if case == "sam3":
        # Its positions keep the slot of a class token that it has none of.
        positions = f"{wrapper}pos_embed"
        original[positions] = torch.cat((torch.full((1, 1, 32), torch.nan), original[positions]), 1)
    for block in range(VIT["depth"]):
        prefix = f"{wrapper}blocks.{block}.attn."
        for kind in ("weight", "bias"):
            original[f"{prefix}qkv.{kind}"] = torch.cat([original.pop(f"{prefix}{part}_proj.{kind}") for part in "qkv"])
    found = []
    for name, tensors in (("original", {"model": original}), ("transformers", weights)):
        torch.save(tensors, tmp_path / f"{name}.pth")
        branch = Vit(our_config(case))
        found.append(branch_weights(branch, branch.config, tmp_path / f"{name}.pth"))
        assert found[-1].keys() == branch.state_dict().keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize(
    "nested",
    [
        lambda weights, other: {"teacher": {f"backbone.{name}": value for name, value in weights.items()}, "epoch": 3},
        lambda weights, other: {
            "state_dict": other,
            "state_dict_ema": weights,
            "args": Namespace(teachers=[{"name": 1}]),
        },
        lambda weights, other: {"model": {"module": {f"module.{name}": value for name, value in weights.items()}}},
        lambda weights, other: {"model": other, "ema": {"module": weights, "updates": 7}},
        lambda weights, other: {"weights": {f"visual.{name}": value for name, value in weights.items()}},
    ],
)
def test_networks_inside_checkpoints_are_found_averages_first(tmp_path, nested):
    weights = randomise(CASES["dinov3_s"]((GRID, GRID))).state_dict()
    other = {name: torch.zeros_like(value) for name, value in weights.items()}
    found = []
    for name, content in (("plain", weights), ("nested", nested(weights, other))):
        torch.save(content, tmp_path / f"{name}.pth")
        branch = Vit(our_config("dinov3_s"))
        found.append(branch_weights(branch, branch.config, tmp_path / f"{name}.pth"))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "before", ["model.", "_orig_mod.", "module._orig_mod.", "_forward_module.", "model.backbone.", "teacher.backbone."]
)
def test_what_wrappers_put_before_all_names_is_taken_off(tmp_path, before, suffix):
    weights = {name: value.contiguous() for name, value in CASES["dinov3_s"]((GRID, GRID)).state_dict().items()}
    wrapped = {before + name: value for name, value in weights.items()}
    if "backbone" in before:
        outer = before.replace("backbone.", "").replace("teacher", "student")
        wrapped[f"{outer}head.weight"] = torch.zeros(2)
    found = []
    for content in (weights, wrapped):
        (torch.save if suffix == ".pth" else save_file)(content, tmp_path / f"w{suffix}")
        branch = Vit(our_config("dinov3_s"))
        loaded = branch_weights(branch, branch.config, tmp_path / f"w{suffix}")
        found.append({name: value.clone() for name, value in loaded.items()})
    assert found[0].keys() == found[1].keys() == branch.state_dict().keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("before", ["", "module."])
def test_shards_are_unwrapped_together(tmp_path, before):
    weights = CASES["dinov3_b of transformers"]((GRID, GRID)).state_dict()
    names = sorted(weights)
    index = {before + name: f"w-{int('layer.0' in name)}.safetensors" for name in names}
    for shard in set(index.values()):
        save_file(
            {name: weights[name.removeprefix(before)] for name in index if index[name] == shard}, tmp_path / shard
        )
    (tmp_path / "w.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    branch = Vit(our_config("dinov3_b of transformers"))
    assert branch_weights(branch, branch.config, tmp_path).keys() == branch.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensor: tensor.to(torch.int8),
            r"49 not of floats \(.*torch.int8.*name the file that was not quantised",
        ),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), r"49 not of floats \(.*torch.float8_e4m3fn"),
        (lambda tensor: tensor.to(torch.complex64), r"49 not of floats \(.*torch.complex64"),
        (lambda tensor: tensor.to_sparse(), "is no plain tensor: got 'torch.sparse_coo'"),
        (lambda tensor: tensor.to("meta"), "is no plain tensor: got 'one without values'"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_tensors_that_are_no_floats_are_refused(tmp_path, change, said):
    weights = CASES["dinov3_s"]((GRID, GRID)).state_dict()
    torch.save({name: change(value) for name, value in weights.items()}, tmp_path / "w.pth")
    config = our_config("dinov3_s")
    with pytest.raises(ModelError, match=said):
        branch_weights(Vit(config), config, tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_taken_as_they_are(tmp_path, dtype):
    weights = {name: value.to(dtype) for name, value in CASES["dinov3_s"]((GRID, GRID)).state_dict().items()}
    torch.save(weights, tmp_path / "w.pth")
    branch = Vit(our_config("dinov3_s"))
    found = branch_weights(branch, branch.config, tmp_path / "w.pth")
    assert {value.dtype for value in found.values()} == {dtype}


def test_another_familys_file_of_the_same_shapes_is_refused(tmp_path):
    # SigLIP L has all of InternViT-300M but for its layer scales, which would start at 0.1.
    torch.save(randomise(CASES["siglip2_b of transformers"]((GRID, GRID))).state_dict(), tmp_path / "siglip.pth")
    config = our_config("internvit_300m_v2_5")
    with pytest.raises(ModelError, match=r"6 missing \(blocks.0.ls1.gamma.*OpenGVLab/InternViT-300M"):
        branch_weights(Vit(config), config, tmp_path / "siglip.pth")
    config = config.model_copy(update={"layer_scale_init": 1.0})
    assert branch_weights(Vit(config), config, tmp_path / "siglip.pth")


def test_radios_own_name_of_a_layer_scale_is_known(tmp_path):
    # Which its code writes, since Hugging Face renames what is called gamma.
    config = our_config("radio_v4_h").model_copy(update={"layer_scale_init": 1.0})
    branch = Vit(config)
    weights = {
        f"base_model.{name.replace('.gamma', '.grandma')}": value
        for name, value in branch.state_dict().items()
        if name.startswith("blocks.")
    }
    for name, ours in (("embedder.weight", "embedding.proj.weight"), ("pos_embed", "embedding.position")):
        weights[f"base_model.patch_generator.{name}"] = branch.state_dict()[ours]
    weights["base_model.patch_generator.cls_token.token"] = branch.registers.token[0]
    torch.save(weights, tmp_path / "radio.pth.tar")
    found = branch_weights(branch, config, tmp_path / "radio.pth.tar")
    assert all(torch.equal(value, found[name]) for name, value in branch.state_dict().items())


def test_dinov3s_convnext_is_hugging_faces_and_timms(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from timm.models.convnext import ConvNeXt as TimmConvNext
    from timm.models.convnext import checkpoint_filter_fn
    from transformers.models.dinov3_convnext import DINOv3ConvNextConfig, DINOv3ConvNextModel

    numbers = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
    theirs = randomise(DINOv3ConvNextModel(DINOv3ConvNextConfig(**numbers)))
    config = ConvNextBranchConfig(resolution_px=64, depths=(1, 2, 1, 1), widths=(8, 16, 24, 32))
    original = {}
    for name, value in theirs.state_dict().items():
        name = name.removeprefix("model.").replace("layer_norm", "norm")
        for old, new in (("depthwise_conv", "dwconv"), ("pointwise_conv", "pwconv"), (".layers.", ".")):
            name = name.replace(old, new)
        if "downsample_layers" in name:
            name = "downsample_layers." + name.removeprefix("stages.").replace(".downsample_layers", "")
        original[name] = value
    timms = checkpoint_filter_fn(dict(original), TimmConvNext(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), num_classes=0))
    branches = []
    for number, weights in enumerate((theirs.state_dict(), original, timms)):
        torch.save(weights, tmp_path / f"{number}.pth")
        branches.append(ConvNext(config).eval())
        load(branches[-1], tmp_path / f"{number}.pth")
    first, *others = (branch.state_dict() for branch in branches)
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())

    image = torch.randn(1, 3, 96, 70, requires_grad=True)
    expected, found, state, start = [], [], branches[0].embed(image), 0
    for stage in theirs.model.stages:
        stage.register_forward_hook(lambda _module, _inputs, output: expected.append(output))
    theirs(image)
    for end in (1, 4, 6, 8):
        state, start = branches[0].run(state, start, end), end
        found.append(state.grid_BHWC.permute(0, 3, 1, 2))
    assert all(error(mine, truth) <= TOLERANCE for mine, truth in zip(found, expected, strict=True))
    assert error(gradient(found, image), gradient(expected, image)) <= TOLERANCE


def test_joined_projections_are_joined_when_somebody_looks(tmp_path):
    case = "dinov3_b of transformers"
    save_file(randomise(CASES[case]((GRID, GRID))).state_dict(), tmp_path / "model.safetensors")
    branch = Vit(our_config(case))
    weights = branch_weights(branch, branch.config, tmp_path / "model.safetensors")
    name = "blocks.0.attn.qkv.weight"
    assert isinstance(weights.values_as_read[name], Joined)
    assert weights.values_as_read[name].shape == weights[name].shape == (96, 32)
    assert weights[name] is not weights[name]


def test_a_bias_for_keys_is_never_left_out_in_silence(tmp_path):
    weights = randomise(CASES["sam3"]((GRID, GRID))).state_dict()
    torch.save(weights, tmp_path / "sam.pth")
    config = our_config("sam3").model_copy(update={"key_bias": False})
    with pytest.raises(ModelError, match=r"blocks.0.attn.key_bias.*facebook/sam3.*key_bias=True on the branch"):
        branch_weights(Vit(config), config, tmp_path / "sam.pth")


@pytest.mark.parametrize("absent", ["file", "folder", "everything in the folder", "a shard"])
def test_an_absent_file_says_where_the_hub_has_it(tmp_path, absent):
    folder = tmp_path / "folder"
    if absent == "a shard":
        folder.mkdir()
        index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        save_file({"a": torch.zeros(1)}, folder / index["a"])
    elif absent == "everything in the folder":
        folder.mkdir()
    named = folder / "model.safetensors" if absent == "file" else folder
    for preset in FOUNDATION_PRESETS.values():
        branch = preset | {"pretrained": str(named), "resolution_px": 64}
        config = PiipConfig(branches=(branch,), pyramid={"scales": (1.0,)})
        with pytest.raises(ModelError) as raised:
            check_pretrained(config)
        assert raised.value.line.endswith(f"hf download {preset['released_as']} --local-dir {folder}")
        assert absent != "a shard" or "00002-of-00002" in raised.value.line


def test_a_file_of_another_model_says_whose_numbers_the_branch_has(tmp_path):
    torch.save(randomise(CASES["siglip2_so400m"]((GRID, GRID))).state_dict(), tmp_path / "siglip.pth")
    config = our_config("dinov3_s")
    with pytest.raises(ModelError, match=r"\d+ missing \(.*facebook/dinov3-vits16-pretrain-lvd1689m") as raised:
        branch_weights(Vit(config), config, tmp_path / "siglip.pth")
    assert len(raised.value.line) < 600


def test_a_pickle_without_a_network_says_what_it_has(tmp_path):
    torch.save({"optimizer": {"lr": 1.0}, "epoch": 3}, tmp_path / "training.pth")
    config = our_config("dinov3_s")
    with pytest.raises(ModelError, match=r"no tensors in the file.*it holds optimizer, epoch"):
        branch_weights(Vit(config), config, tmp_path / "training.pth")


def test_a_folder_with_one_pickle_is_that_pickle(tmp_path):
    # As the hub has Perception Encoder.
    weights = randomise(CASES["pe_spatial_b"]((GRID, GRID))).state_dict()
    torch.save(weights, tmp_path / "PE-Spatial-B16-512.pt")
    branch = Vit(our_config("pe_spatial_b"))
    assert branch_weights(branch, branch.config, tmp_path).keys() == branch.state_dict().keys()
