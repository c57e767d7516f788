"""Foundation models as branches, against the libraries that own them: random weights, through the files' own names."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from piip_scale.config.branches import ConvNextBranchConfig, VitBranchConfig
from piip_scale.config.model import PiipConfig
from piip_scale.config.presets import PRESETS
from piip_scale.errors import ModelError
from piip_scale.models.branch import BranchState
from piip_scale.models.convnext import ConvNext
from piip_scale.models.joined import Joined
from piip_scale.models.pretrained import branch_weights, check_pretrained
from piip_scale.models.vit import Vit
from piip_scale.ops.resize import resize_position

TOLERANCE = 1e-5
GRID = 4
SIZES = {"odd": (5, 7), "wide": (3, 6), "its own": (GRID, GRID)}
VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2}


def timm_model(name, grid, patch=16, **options):
    import timm

    size = {"img_size": (grid[0] * patch, grid[1] * patch), "patch_size": patch}
    return timm.create_model(name, num_classes=0, **size, **VIT, **options)


def transformers_model(module, kind, **numbers):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    del transformers
    from importlib import import_module

    models = import_module(f"transformers.models.{module}")
    numbers = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2} | numbers
    return getattr(models, f"{kind}Model")(getattr(models, f"{kind}Config")(attn_implementation="eager", **numbers))


def dinov3(**numbers):
    return transformers_model("dinov3_vit", "DINOv3ViT", num_register_tokens=4, intermediate_size=128, **numbers)


CASES = {
    "dinov3_s": lambda grid: timm_model("vit_small_patch16_dinov3_qkvb", grid),
    "dinov3_s without biases": lambda grid: timm_model("vit_small_patch16_dinov3", grid),
    "dinov3_s_plus": lambda grid: timm_model("vit_small_plus_patch16_dinov3_qkvb", grid),
    "dinov3_7b": lambda grid: timm_model("vit_7b_patch16_dinov3", grid),
    "dinov3_b of transformers": lambda grid: dinov3(),
    "dinov3_h_plus of transformers": lambda grid: dinov3(use_gated_mlp=True, hidden_act="silu"),
    "pe_spatial_b": lambda grid: timm_model("vit_pe_spatial_base_patch16_512", grid, ref_feat_shape=(32, 32)),
    "pe_spatial_g": lambda grid: timm_model("vit_pe_spatial_gigantic_patch14_448", grid),
    "eva02_s": lambda grid: timm_model("eva02_small_patch14_224", grid, global_pool="token"),
    "eva02_l": lambda grid: timm_model("eva02_large_patch14_224", grid, global_pool="token"),
    "siglip2_so400m": lambda grid: timm_model("vit_so400m_patch16_siglip_512", grid),
    "siglip2_b of transformers": lambda grid: transformers_model(
        "siglip", "SiglipVision", intermediate_size=128, image_size=16 * GRID, patch_size=16
    ),
    "radio_v4_h": lambda grid: transformers_model("radio", "Radio", max_img_size=16 * GRID),
    "sam3": lambda grid: transformers_model(
        "sam3",
        "Sam3ViT",
        intermediate_size=148,
        image_size=[16 * grid[1], 16 * grid[0]],
        pretrain_image_size=16 * GRID,
        patch_size=16,
        window_size=3,
        global_attn_indexes=[1],
    ),
    "internvit_300m_v2_5": lambda grid: timm_model("vit_intern300m_patch14_448", grid),
    "internvit_300m_v2_5 of transformers": lambda grid: transformers_model(
        "internvl",
        "InternVLVision",
        intermediate_size=128,
        image_size=[16 * GRID] * 2,
        patch_size=[16, 16],
        attention_bias=True,
        norm_type="layer_norm",
    ),
    "internvit_6b_v2_5 of transformers": lambda grid: transformers_model(
        "internvl",
        "InternVLVision",
        intermediate_size=128,
        image_size=[16 * GRID] * 2,
        patch_size=[16, 16],
        use_qk_norm=True,
        norm_type="rms_norm",
    ),
}
OURS = {
    "sam3": {
        "window_size_tokens": (3, 0, 3),
        "rotary": PRESETS["sam3"]["rotary"] | {"pretrain_grid_cells": 3},
    },
    "internvit_300m_v2_5": {"class_token": True},
    "internvit_300m_v2_5 of transformers": {"class_token": True},
    "internvit_6b_v2_5 of transformers": {"class_token": True},
}


def our_config(case):
    numbers = VIT | {"resolution_px": 64, "pretrain_resolution_px": 16 * GRID, "patch_size_px": 16}
    return VitBranchConfig(**PRESETS[case.split()[0]] | numbers | OURS.get(case, {}))


def randomise(module):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.2 if parameter.ndim > 1 or name.endswith("bias") else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            # Scales that RADIO has none of, and that Hugging Face's code has as 1 for it.
            if "lambda1" in name and "Radio" in type(module).__name__:
                parameter.fill_(1)
    return module.eval()


def positions_of(module):
    """The parameter of learned positions, and its name."""
    names = ("pos_embed", "position_embedding.weight", "position_embedding", "position_embeddings")
    for name, parameter in module.named_parameters():
        if name.endswith(names):
            return name, parameter
    return None, None


def blocks_of(module):
    lists = (part for part in module.modules() if isinstance(part, nn.ModuleList | nn.Sequential))
    return next(part for part in lists if len(part) == VIT["depth"])


def flat(tokens):
    return tokens.flatten(1, 2) if tokens.ndim == 4 else tokens


def run_theirs(module, image, **options):
    found = []

    def keep(_module, _inputs, output):
        found.append(flat(output[0] if isinstance(output, tuple) else output))

    hooks = [block.register_forward_hook(keep) for block in blocks_of(module)]
    module(image, **options)
    for hook in hooks:
        hook.remove()
    return found


def tokens_of(state: BranchState):
    parts = (state.class_token_B1C, state.registers_BRC, state.grid_BHWC.flatten(1, 2))
    return torch.cat([part for part in parts if part is not None], 1)


def run_ours(branch, image):
    state, found = branch.embed(image), []
    for block in range(len(branch.blocks)):
        state = branch.run(state, block, block + 1)
        found.append(tokens_of(state))
    return found


def gradient(outputs, image):
    total = sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).mean() for o in outputs)
    return torch.autograd.grad(total, image)[0]


def error(found, truth):
    return ((found - truth).abs().max() / truth.abs().max()).item()


def compare(case, grid, folder):
    """Largest errors of tokens after any block and of the image's gradient, over the largest value."""
    theirs = randomise(CASES[case]((GRID, GRID)))
    weights = {name: value.contiguous() for name, value in theirs.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    config = our_config(case)
    branch = Vit(config).eval()
    if hasattr(theirs, "make_preprocessor_external"):
        theirs.make_preprocessor_external()
    load(branch, folder / "model.safetensors")
    if case == "internvit_300m_v2_5":
        # By the names that DeiT and MAE have too, of whose class tokens PIIP leaves the position out.
        branch.class_token.token.data += weights["pos_embed"][:, :1]
    if grid != (GRID, GRID):
        theirs = at_another_size(case, theirs, grid)
    image = torch.randn(2, 3, 16 * grid[0], 16 * grid[1], generator=torch.Generator().manual_seed(6))
    image.requires_grad_()
    options = {"interpolate_pos_encoding": True} if "Siglip" in type(theirs).__name__ else {}
    expected, found = run_theirs(theirs, image, **options), run_ours(branch, image)
    tokens = max(error(mine, truth) for mine, truth in zip(found, expected, strict=True))
    return tokens, error(gradient(found, image), gradient(expected, image))


def at_another_size(case, theirs, grid):
    """Their model for another grid, with the same weights; timm's cannot change, and resizes positions its own way."""
    if type(theirs).__module__.startswith("transformers") and "Sam3" not in type(theirs).__name__:
        return theirs
    other = CASES[case](grid).eval()
    weights = theirs.state_dict()
    name, own = positions_of(other)
    if own is not None and own.shape != weights[name].shape:
        slots = weights[name].shape[1] - GRID**2
        resized = resize_position(weights[name][:, slots:], GRID, *grid).flatten(1, 2)
        weights[name] = torch.cat((weights[name][:, :slots], resized), 1)
    other.load_state_dict(weights)
    return other


def load(branch, path):
    branch.load_state_dict(branch_weights(branch, branch.config, path), strict=False)


@pytest.mark.parametrize("size", ["odd", *(pytest.param(size, marks=pytest.mark.slow) for size in ("wide", "its own"))])
@pytest.mark.parametrize("case", CASES)
def test_tokens_and_gradients_are_the_librarys_after_every_block(tmp_path, case, size):
    tokens, gradients = compare(case, SIZES[size], tmp_path)
    assert tokens <= TOLERANCE
    assert gradients <= TOLERANCE


PARAMETERS = {
    "dinov3_s": "vit_small_patch16_dinov3_qkvb",
    "dinov3_s_plus": "vit_small_plus_patch16_dinov3_qkvb",
    "dinov3_b": "vit_base_patch16_dinov3_qkvb",
    "dinov3_l": "vit_large_patch16_dinov3_qkvb",
    "dinov3_h_plus": "vit_huge_plus_patch16_dinov3_qkvb",
    "dinov3_7b": "vit_7b_patch16_dinov3",
    "pe_spatial_t": "vit_pe_spatial_tiny_patch16_512",
    "pe_spatial_s": "vit_pe_spatial_small_patch16_512",
    "pe_spatial_b": "vit_pe_spatial_base_patch16_512",
    "pe_spatial_l": "vit_pe_spatial_large_patch14_448",
    "pe_spatial_g": "vit_pe_spatial_gigantic_patch14_448",
    "eva02_ti": "eva02_tiny_patch14_224",
    "eva02_s": "eva02_small_patch14_224",
    "eva02_b": "eva02_base_patch14_224",
    "eva02_l": "eva02_large_patch14_224",
    "siglip2_b": "vit_base_patch16_siglip_512",
    "siglip2_l": "vit_large_patch16_siglip_512",
    "siglip2_so400m": "vit_so400m_patch16_siglip_512",
    "siglip2_g": "vit_giantopt_patch16_siglip_384",
    "internvit_300m_v2_5": "vit_intern300m_patch14_448",
}


@pytest.mark.parametrize("depth", [1, pytest.param(0, marks=pytest.mark.slow, id="all")])
def test_presets_have_timms_parameters(depth):
    """Blocks are alike: one says what all do."""
    import timm

    for preset, name in PARAMETERS.items():
        own = {"depth": depth} if depth else {}
        with torch.device("meta"):
            theirs = timm.create_model(name, num_classes=0, **own)
            patch, side = theirs.patch_embed.patch_size[0], theirs.patch_embed.img_size[0]
            size = {"resolution_px": side, "pretrain_resolution_px": side, "patch_size_px": patch}
            kept = {"class_token": theirs.cls_token is not None, "position_class_slot": False}
            ours = Vit(VitBranchConfig(**PRESETS[preset] | size | kept | own))
        slot = 0
        if getattr(theirs, "pos_embed", None) is not None:
            # A position of the class token is added to that token when it is loaded.
            slot = (theirs.pos_embed.shape[1] - theirs.patch_embed.num_patches) * theirs.embed_dim
        heads = ("norm.", "fc_norm", "head", "attn_pool")
        expected = sum(value.numel() for key, value in theirs.named_parameters() if not key.startswith(heads))
        assert sum(value.numel() for value in ours.parameters()) == expected - slot, preset


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
WRAPPERS = {"sam3": "detector.backbone.vision_backbone.trunk.", "radio_v4_h": "radio_model.model."}


@pytest.mark.parametrize("case", RENAMES)
def test_originals_of_sam_and_radio_are_those_of_transformers(tmp_path, case):
    weights = randomise(CASES[case]((GRID, GRID))).state_dict()
    original = {"elsewhere.weight": torch.zeros(3)}
    for name, value in weights.items():
        if "layer_scale" in name or name.startswith(("input_conditioner", "summary")):
            continue
        for old, new in (*RENAMES[case], (".attention.", ".attn."), ("o_proj", "proj")):
            name = name.replace(old, new)
        original[WRAPPERS[case] + name] = value
    for block in range(VIT["depth"]):
        prefix = f"{WRAPPERS[case]}blocks.{block}.attn."
        for kind in ("weight", "bias"):
            original[f"{prefix}qkv.{kind}"] = torch.cat([original.pop(f"{prefix}{part}_proj.{kind}") for part in "qkv"])
    found = []
    for name, tensors in (("original", original), ("transformers", weights)):
        torch.save(tensors, tmp_path / f"{name}.pth")
        branch = Vit(our_config(case))
        found.append(branch_weights(branch, branch.config, tmp_path / f"{name}.pth"))
        assert found[-1].keys() == branch.state_dict().keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


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
    with pytest.raises(ModelError, match=r"bias for keys.*key_bias=True"):
        branch_weights(Vit(config), config, tmp_path / "sam.pth")


def test_an_absent_file_says_where_the_hub_has_it(tmp_path):
    config = our_config("dinov3_7b").model_copy(update={"pretrained": str(tmp_path / "dinov3" / "model.safetensors")})
    command = r"hf download facebook/dinov3-vit7b16-pretrain-lvd1689m --local-dir \S+/dinov3$"
    with pytest.raises(ModelError, match=command):
        check_pretrained(PiipConfig(branches=(config,), pyramid={"scales": (1.0,)}))
