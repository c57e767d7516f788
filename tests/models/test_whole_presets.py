"""Every preset, by its true numbers: parameters and tokens of the library that owns it, products that torch counts."""

from importlib import import_module

import numpy as np
import pytest
import torch
from foundation import TOLERANCE, error, flat, gradient, load, tokens_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from piip_scale.config.branches import ConvNextBranchConfig, VitBranchConfig
from piip_scale.config.foundation_presets import FOUNDATION_PRESETS
from piip_scale.config.model import PiipConfig
from piip_scale.models.convnext import ConvNext
from piip_scale.models.counting import count_network
from piip_scale.models.piip import PIIP
from piip_scale.models.vit import Vit
from piip_scale.ops.resize import resize_position

PATCH_PX = 16
NUM_BLOCKS = 2
"""Blocks of a preset are alike, but for SAM 3's windows: two say what all do."""
TIMM = {
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
CONVNEXTS = {f"dinov3_convnext_{size}": f"convnext_{size}" for size in ("tiny", "small", "base", "large")}
RADIO = {
    "radio_v3_b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_registers": 4},
    "radio_v3_l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_registers": 4},
    "radio_v3_h": {"num_registers": 4},
    "radio_v4_so400m": {"hidden_size": 1152, "num_hidden_layers": 27, "mlp_ratio": 4304 / 1152},
    "radio_v4_h": {},
}
"""What they have beside the library's defaults; the third version has four teachers' class tokens, the fourth three."""
INTERNVIT = {"internvit_6b_224px": (48, 16), "internvit_6b_v1_2": (45, 32), "internvit_6b_v1_5": (45, 32)}
INTERNVIT |= {"internvit_6b_v2_5": (45, 32)}
"""Blocks, and cells a side of learned positions."""


def of_transformers(module, kind, **numbers):
    pytest.importorskip("transformers", reason="transformers is not installed")
    models = import_module(f"transformers.models.{module}")
    return getattr(models, f"{kind}Model")(getattr(models, f"{kind}Config")(attn_implementation="eager", **numbers))


def theirs_of(preset, grid, depth):
    """The library's model for a grid of cells, of so many blocks or of all."""
    size_px = tuple(PATCH_PX * cells for cells in grid)
    if preset in TIMM | CONVNEXTS:
        return timm_model(preset, size_px, {} if depth is None else {"depth": depth})
    blocks = {} if depth is None else {"num_hidden_layers": depth}
    if preset in RADIO:
        cls_tokens = {"num_cls_tokens": 4} if "v3" in preset else {}
        return of_transformers("radio", "Radio", **RADIO[preset] | cls_tokens | blocks)
    if preset == "sam3":
        last = {} if depth is None else {"global_attn_indexes": [depth - 1]}
        size = {"image_size": list(size_px[::-1]), "pretrain_image_size": 24 * PATCH_PX, "patch_size": PATCH_PX}
        # As Meta's own code has it; the class's default is 1e-6.
        return of_transformers("sam3", "Sam3ViT", layer_norm_eps=1e-5, **size, **blocks, **last)
    all_blocks, cells = INTERNVIT[preset]
    numbers = {"hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25, "use_qk_norm": True}
    numbers |= {"num_hidden_layers": all_blocks, "norm_type": "rms_norm"} | blocks
    image = {"image_size": [PATCH_PX * cells] * 2, "patch_size": [PATCH_PX] * 2}
    return of_transformers("internvl", "InternVLVision", **numbers, **image)


def timm_model(preset, size_px, options):
    import timm

    if preset in CONVNEXTS:
        return timm.create_model(CONVNEXTS[preset], num_classes=0)
    if preset.startswith("pe_spatial"):
        options |= {"ref_feat_shape": (32, 32)}
    if preset == "siglip2_b":
        # Whose tanh timm leaves out in this size alone; its owners' code and Hugging Face's have it in all.
        options |= {"act_layer": "gelu_tanh"}
    if preset.startswith("eva02"):
        options |= {"global_pool": "token"}
    return timm.create_model(TIMM[preset], num_classes=0, img_size=size_px, patch_size=PATCH_PX, **options)


def config_of(preset, depth=None):
    numbers = FOUNDATION_PRESETS[preset] | {"resolution_px": 512}
    if numbers["kind"] == "convnext":
        return ConvNextBranchConfig(**numbers)
    if depth is not None:
        windows = (24,) * (depth - 1) + (0,) if preset == "sam3" else ()
        numbers |= {"depth": depth, "window_size_tokens": windows}
    # Files of the first three have the token; its position goes into it.
    token = {"class_token": True} if preset.startswith("internvit") else {}
    return VitBranchConfig(**numbers | token)


def pretraining_grid(preset):
    side = FOUNDATION_PRESETS[preset].get("pretrain_resolution_px", 224) // PATCH_PX
    return side, side


NOT_OF_A_BRANCH = ("norm.", "fc_norm.", "head.", "attn_pool.")
DEPTHS = [NUM_BLOCKS, pytest.param(None, marks=pytest.mark.slow, id="all")]


def is_of_a_branch(preset, name):
    # RADIO has no layer scales: Hugging Face's class has them, as ones.
    return not name.startswith(NOT_OF_A_BRANCH) and not (preset in RADIO and "layer_scale" in name)


def position_slots(preset, theirs, num_cells):
    """Numbers of learned positions of tokens before the cells: branches add them to those tokens, but InternViT's."""
    position = dict(theirs.named_parameters()).get("pos_embed")
    return (
        0 if position is None or preset.startswith("internvit") else (position.shape[1] - num_cells) * position.shape[2]
    )


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("preset", FOUNDATION_PRESETS)
def test_a_preset_has_the_librarys_parameters(preset, depth):
    grid = pretraining_grid(preset)
    config = config_of(preset, depth)
    with torch.device("meta"):
        theirs = theirs_of(preset, grid, depth)
        ours = (ConvNext if preset in CONVNEXTS else Vit)(config)
    expected = sum(p.numel() for name, p in theirs.named_parameters() if is_of_a_branch(preset, name))
    expected -= position_slots(preset, theirs, grid[0] * grid[1])
    assert sum(p.numel() for p in ours.parameters()) == expected


@pytest.mark.parametrize("preset", TIMM | CONVNEXTS)
def test_a_preset_has_the_pixels_that_timm_has(preset):
    import timm

    name = f"{CONVNEXTS[preset]}.dinov3_lvd1689m" if preset in CONVNEXTS else TIMM[preset]
    theirs = timm.get_pretrained_cfg(name)
    found = [[value / 255 for value in FOUNDATION_PRESETS[preset][key]] for key in ("mean", "std")]
    # To what a preset's six digits hold.
    np.testing.assert_allclose(found, [theirs.mean, theirs.std], rtol=1e-6)


@pytest.mark.parametrize("size_px", [None, (368, 597)], ids=["its own", "odd"])
@pytest.mark.parametrize("preset", FOUNDATION_PRESETS)
def test_a_presets_products_are_those_that_torch_counts(preset, size_px):
    # Positions of RADIO are for 2048 px, which no image of its pretraining had.
    height, width = size_px or (min(PATCH_PX * pretraining_grid(preset)[0], 512),) * 2
    # Images in the statistics of pretraining are no products.
    branch = config_of(preset, NUM_BLOCKS).model_copy(update={"mean": None, "std": None})
    config = PiipConfig(branches=(branch,), pyramid={"scales": (1.0,)}, attention_kernel="math")
    with torch.device("meta"):
        model, image = PIIP(config).eval().requires_grad_(False), torch.zeros(1, 3, height, width)
        with FlopCounterMode(display=False) as counter:
            model(image)
    assert sum(part.macs for part in count_network(config, height, width)) * 2 == counter.get_total_flops()


def draw(module):
    """Weights that keep the size of what goes through them, as trained ones do."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            spread = fan_in**-0.5 if parameter.ndim > 1 else 0.2
            mean = 1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + mean)
            if "lambda1" in name and "Radio" in type(module).__name__:
                parameter.fill_(1)
    return module.eval()


def blocks_of(preset, theirs):
    """Their parts that correspond to our blocks."""
    if preset not in CONVNEXTS:
        lists = (part for part in theirs.modules() if isinstance(part, nn.ModuleList | nn.Sequential))
        return next(part for part in lists if len(part) == NUM_BLOCKS)
    return [
        part for i, stage in enumerate(theirs.stages) for part in ([stage.downsample] if i else []) + [*stage.blocks]
    ]


def run_theirs(preset, theirs, image):
    found = []

    def keep(_module, _inputs, output):
        tokens = output[0] if isinstance(output, tuple) else output
        found.append(tokens.permute(0, 2, 3, 1) if preset in CONVNEXTS else flat(tokens))

    hooks = [block.register_forward_hook(keep) for block in blocks_of(preset, theirs)]
    theirs(image)
    for hook in hooks:
        hook.remove()
    return found


def run_ours(branch, image):
    state, found = branch.embed(image), []
    for block in range(len(branch.blocks)):
        state = branch.run(state, block, block + 1)
        found.append(state.grid_BHWC if isinstance(branch, ConvNext) else tokens_of(state))
    return found


def at_another_size(preset, theirs, grid):
    """timm's and SAM 3's models cannot change their grid: another takes the weights, positions resized as ours are."""
    if preset in CONVNEXTS or preset in RADIO or preset in INTERNVIT:
        return theirs
    other = theirs_of(preset, grid, NUM_BLOCKS).eval()
    weights = theirs.state_dict()
    own = getattr(other, "pos_embed", None)
    if own is not None and own.shape != weights["pos_embed"].shape:
        side = pretraining_grid(preset)[0]
        slots = weights["pos_embed"].shape[1] - side**2
        resize = config_of(preset, NUM_BLOCKS).position_resize
        resized = resize_position(weights["pos_embed"][:, slots:], side, *grid, resize).flatten(1, 2)
        weights["pos_embed"] = torch.cat((weights["pos_embed"][:, :slots], resized), 1)
    other.load_state_dict(weights)
    return other


@pytest.mark.slow
@pytest.mark.parametrize("preset", FOUNDATION_PRESETS)
def test_a_presets_tokens_and_gradients_are_the_librarys(tmp_path, preset):
    """At its pretraining's size and at an odd one, after every one of two blocks, through the library's file."""
    own = pretraining_grid(preset)
    theirs = draw(theirs_of(preset, own, NUM_BLOCKS))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    config = config_of(preset, NUM_BLOCKS)
    branch = (ConvNext if preset in CONVNEXTS else Vit)(config).eval()
    load(branch, tmp_path / "weights.pth")
    if preset == "internvit_300m_v2_5":
        # By the names that DeiT and MAE have too, of whose class tokens PIIP leaves the position out.
        branch.class_token.token.data += theirs.pos_embed[:, :1].data
    if preset in RADIO:
        theirs.make_preprocessor_external()
        # Which no image of its pretraining filled.
        own = (32, 32)
    for grid in (own, (5, 9)):
        if grid != own:
            theirs = at_another_size(preset, theirs, grid)
        image = torch.randn(1, 3, *(PATCH_PX * cells for cells in grid), generator=torch.Generator().manual_seed(6))
        image.requires_grad_()
        expected, found = run_theirs(preset, theirs, image), run_ours(branch, image)
        assert max(error(mine, truth) for mine, truth in zip(found, expected, strict=True)) <= TOLERANCE
        assert error(gradient(found, image), gradient(expected, image)) <= TOLERANCE
