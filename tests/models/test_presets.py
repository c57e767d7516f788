import pytest

from piip_scale.config.foundation_presets import FOUNDATION_PRESETS
from piip_scale.config.model import PiipConfig
from piip_scale.config.presets import PRESETS
from piip_scale.models.official_config import read_official_config

FILES = {
    "deit_tiny_patch16_224": "deit_tiny",
    "deit_3_small_224_21k": "deit3_small",
    "deit_3_base_224_21k": "deit3_base",
    "deit_3_large_224_21k": "deit3_large",
    "deit_3_small_384_21k": "deit3_384_small",
    "deit_3_base_384_21k": "deit3_384_base",
    "deit_3_large_384_21k": "deit3_384_large",
    "S_16-i21k": "augreg_384_small",
    "B_16-i21k": "augreg_384_base",
    "L_16-i21k": "augreg_384_large",
    "mae_pretrain_vit_base": "mae_base",
    "mae_pretrain_vit_large": "mae_large",
    "mae_pretrain_vit_huge": "mae_huge",
    "dinov2_vits14": "dinov2_small",
    "dinov2_vitb14": "dinov2_base",
    "dinov2_vitl14": "dinov2_large",
    "beitv2_base": "beitv2_base",
    "beitv2_large": "beitv2_large",
    "uni-perceiver-base": "uni_perceiver_base",
    "uni-perceiver-large": "uni_perceiver_large",
    "convnext-tiny": "convnext_tiny",
    "convnext-small": "convnext_small",
    "convnext-base": "convnext_base",
    "intern_vit_6b": "internvit_6b",
}
UNRELEASED = {"convnext_large", *FOUNDATION_PRESETS}
OF_A_RECIPE = {
    "resolution_px",
    "blocks_per_stage",
    "drop_path_rate",
    "drop_path_mode",
    "window_size_tokens",
    "checkpoint_blocks",
    "activation",
}


def test_every_preset_is_the_branch_that_released_configs_build(released_backbones):
    seen = set()
    for path, backbone in released_backbones.items():
        # The released four-branch class ignores its last branch's numbers; the classifier's positions are its own.
        names = sorted(name for name in backbone if name.startswith("branch"))[:3]
        if path.startswith("classification") or not names:
            continue
        for name, branch in zip(names, read_official_config(backbone).config.branches, strict=False):
            preset = next(value for key, value in FILES.items() if key in backbone[name]["pretrained"])
            recipe = {key: getattr(branch, key) for key in OF_A_RECIPE if hasattr(branch, key)}
            ours = PiipConfig.model_validate(
                {
                    "branches": ({"preset": preset} | recipe,),
                    "interaction": {"num_stages": len(recipe["blocks_per_stage"])},
                    "pyramid": {"scales": (1.0,)},
                }
            ).branches[0]
            assert ours == branch, (path, name)
            seen.add(preset)
    assert seen == set(PRESETS) - UNRELEASED


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_a_whole_branch(name):
    windows = {"window_size_tokens": (14,) * PRESETS[name]["depth"]} if name.startswith("beit") else {}
    config = PiipConfig.model_validate({"branches": ({"preset": name, "resolution_px": 512} | windows,)})
    assert config.branches[0].resolution_px == 512


def branches_with(**keys):
    return PiipConfig.model_validate({"branches": ({"resolution_px": 512} | keys,)})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dinov3_7B", r"preset='dinov3_7B' is unknown; did you mean dinov3_7b or .*\? one of: augreg"),
        ("siglip_so400m", r"did you mean siglip2_so400m"),
        ("???", r"preset='\?\?\?' is unknown; one of: augreg"),
        (7, r"preset=7 is unknown"),
    ],
)
def test_a_misspelt_preset_is_told_the_nearest(name, said):
    with pytest.raises(ValueError, match=said):
        branches_with(preset=name)


def test_a_kind_that_a_preset_is_not_of_is_refused():
    with pytest.raises(ValueError, match=r"preset='dinov3_7b' is a vit, and kind='convnext' stands beside it"):
        branches_with(preset="dinov3_7b", kind="convnext")
    assert branches_with(preset="dinov3_s", kind="vit").branches[0].depth == 12
