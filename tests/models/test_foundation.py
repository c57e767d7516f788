"""Foundation models as branches, against the libraries that own them: random weights, through the files' own names."""

import numpy as np
import pytest
import torch
from foundation import CASES, SIZES, TOLERANCE, compare

from piip_scale.config.branches import VitBranchConfig
from piip_scale.config.presets import PRESETS
from piip_scale.models.vit import Vit


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
        pixels = [[value / 255 for value in PRESETS[preset][key]] for key in ("mean", "std")]
        # To what a preset's six digits hold.
        np.testing.assert_allclose(pixels, [theirs.default_cfg["mean"], theirs.default_cfg["std"]], rtol=1e-6)
        slot = 0
        if getattr(theirs, "pos_embed", None) is not None:
            # A position of the class token is added to that token when it is loaded.
            slot = (theirs.pos_embed.shape[1] - theirs.patch_embed.num_patches) * theirs.embed_dim
        heads = ("norm.", "fc_norm", "head", "attn_pool")
        expected = sum(value.numel() for key, value in theirs.named_parameters() if not key.startswith(heads))
        assert sum(value.numel() for value in ours.parameters()) == expected - slot, preset
