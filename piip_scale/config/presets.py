"""Named backbones: pure data, one row a model, so that a config says ``preset="deit_small"``."""

from __future__ import annotations

from typing import Any

# Scales start at 1, as in the released recipes: trained weights bring their own.
_DEIT = {"kind": "vit", "patch_size_px": 16, "pretrain_resolution_px": 224, "layer_scale_init": 1.0}

PRESETS: dict[str, dict[str, Any]] = {
    "deit_tiny": _DEIT | {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "deit3_small": _DEIT | {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "deit3_base": _DEIT | {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "deit3_large": _DEIT | {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "mae_huge": {
        "kind": "vit",
        "embed_dim": 1280,
        "depth": 32,
        "num_heads": 16,
        "layer_scale_init": 1.0,
        "position_class_slot": True,
        "drop_path_schedule": "linear",
    },
    "internvit_6b": {
        "kind": "vit",
        "embed_dim": 3200,
        "depth": 48,
        "num_heads": 25,
        "norm": "rmsnorm",
        "qkv_bias": False,
        "qk_norm": True,
        "layer_scale_init": 0.1,
        "position_class_slot": True,
        "drop_path_schedule": "linear",
    },
}


def expand_preset(branch: dict[str, Any]) -> dict[str, Any]:
    """Puts a preset's numbers under a branch's own keys, which win.

    Raises:
        ValueError: No preset has that name.
    """
    if "preset" not in branch:
        return branch
    name = branch["preset"]
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is unknown; one of: {', '.join(sorted(PRESETS))}")
    return PRESETS[name] | {key: value for key, value in branch.items() if key != "preset"}
