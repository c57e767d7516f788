"""Small foundation models of the libraries that own them, and their outputs beside those of our branches."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from piip_scale.config.branches import VitBranchConfig
from piip_scale.config.presets import PRESETS
from piip_scale.models.branch import BranchState
from piip_scale.models.pretrained import branch_weights
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
    "pe_spatial_b as its own encoder": lambda grid: timm_model(
        "vit_pe_spatial_base_patch16_512", grid, ref_feat_shape=grid
    ),
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
        # As Meta's own code has it; the class's default is 1e-6.
        layer_norm_eps=1e-5,
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
    "pe_spatial_b as its own encoder": {
        "rotary": PRESETS["pe_spatial_b"]["rotary"] | {"pretrain_grid_cells": 0},
        "position_resize": "bilinear",
    },
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
        resized = resize_position(weights[name][:, slots:], GRID, *grid, our_config(case).position_resize).flatten(1, 2)
        weights[name] = torch.cat((weights[name][:, :slots], resized), 1)
    other.load_state_dict(weights)
    return other


def load(branch, path):
    branch.load_state_dict(branch_weights(branch, branch.config, path), strict=False)
