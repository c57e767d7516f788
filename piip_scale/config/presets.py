"""Named backbones: pure data, one row a model, so that a config says ``preset="deit_small"``."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from piip_scale.config.foundation_presets import FOUNDATION_PRESETS

_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
# Scales per channel start at 1, as in the released recipes: trained weights bring their own.
_DEIT: dict[str, Any] = {"kind": "vit", "layer_scale_init": 1.0}
# The class that InternViT shares with MAE, AugReg and DINOv2 weights.
_INTERNVIT = _DEIT | {"position_class_slot": True, "drop_path_schedule": "linear"}
_BEIT: dict[str, Any] = {
    "kind": "vit",
    "layer_scale_init": 1e-6,
    "key_bias": False,
    "position_embedding": False,
    "relative_position_bias": True,
    "drop_path_schedule": "linear",
}
_UNI_PERCEIVER: dict[str, Any] = {
    "kind": "vit",
    "norm_eps": 1e-5,
    "layer_scale_init": 0.0,
    "embedding_norm": True,
    "frame_positions": 8,
    "drop_path_schedule": "linear",
}
_FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "deit": (_DEIT, ("tiny",)),
    "deit3": (_DEIT, ("small", "base", "large")),
    "deit3_384": (_DEIT | {"pretrain_resolution_px": 384}, ("small", "base", "large")),
    "augreg_384": (_INTERNVIT | {"pretrain_resolution_px": 384}, ("small", "base", "large")),
    "mae": (_INTERNVIT, ("base", "large", "huge")),
    "dinov2": (_INTERNVIT | {"pretrain_resolution_px": 518}, ("small", "base", "large")),
    "beitv2": (_BEIT, ("base", "large")),
    "uni_perceiver": (_UNI_PERCEIVER, ("base", "large")),
}
_CONVNEXT: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}

PRESETS: dict[str, dict[str, Any]] = {
    **{f"{name}_{size}": numbers | _SIZES[size] for name, (numbers, sizes) in _FAMILIES.items() for size in sizes},
    **{
        f"convnext_{size}": {"kind": "convnext", "depths": depths, "widths": widths}
        for size, (depths, widths) in _CONVNEXT.items()
    },
    **FOUNDATION_PRESETS,
    "internvit_6b": _INTERNVIT
    | {"embed_dim": 3200, "depth": 48, "num_heads": 25, "norm": "rmsnorm", "qkv_bias": False, "qk_norm": True}
    | {"layer_scale_init": 0.1},
}


def expand_preset(branch: dict[str, Any]) -> dict[str, Any]:
    """Puts a preset's numbers under a branch's own keys, which win.

    Raises:
        ValueError: No preset has that name, or it is of another kind than the branch says.
    """
    if "preset" not in branch:
        return branch
    name = branch["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        near = get_close_matches(str(name).lower(), PRESETS)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"preset={name!r} is unknown; {meant}one of: {', '.join(sorted(PRESETS))}")
    kind = PRESETS[name]["kind"]
    if branch.get("kind", kind) != kind:
        raise ValueError(f"preset={name!r} is a {kind}, and kind={branch['kind']!r} stands beside it: leave kind out")
    return PRESETS[name] | {key: value for key, value in branch.items() if key != "preset"}
