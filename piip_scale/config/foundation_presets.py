"""Named foundation models: pure data, one row a model, each with the place on the hub that has its weights.

Each says the pixel statistics of its own pretraining. Patches of 14 px become 16 px, as PIIP does it;
``pretrain_resolution_px`` then keeps as many cells as the file has, so that learned positions are resized at most once.
"""

from __future__ import annotations

from typing import Any

_PATCH_PX = 16

# Of pixels, 0 to 255.
_IMAGENET: dict[str, Any] = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
_HALVES: dict[str, Any] = {"mean": (127.5, 127.5, 127.5), "std": (127.5, 127.5, 127.5)}
_CLIP: dict[str, Any] = {"mean": (122.7709383, 116.7460125, 104.09373615), "std": (68.5005327, 66.6321579, 70.32316305)}
_SMALL: dict[str, Any] = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_BASE: dict[str, Any] = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE: dict[str, Any] = {"embed_dim": 1024, "depth": 24, "num_heads": 16}


def _vit(cells: int, **numbers: Any) -> dict[str, Any]:
    """What most have in common, and learned positions on so many cells a side."""
    return {"kind": "vit", "drop_path_schedule": "linear", "pretrain_resolution_px": cells * _PATCH_PX} | numbers


# Simeoni et al., DINOv3: no learned positions, registers, no bias for keys.
_DINOV3 = _vit(
    14,
    norm_eps=1e-5,
    layer_scale_init=1e-5,
    key_bias=False,
    position_embedding=False,
    rotary={"base": 100.0},
    class_token=True,
    register_tokens=4,
    **_IMAGENET,
)
_DINOV3_GATED: dict[str, Any] = {"feed_forward": "swiglu", "mlp_multiple": 8}
_DINOV3_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "s": ("s16", _SMALL),
    "s_plus": ("s16plus", _SMALL | _DINOV3_GATED),
    "b": ("b16", _BASE),
    "l": ("l16", _LARGE),
    "h_plus": ("h16plus", {"embed_dim": 1280, "depth": 32, "num_heads": 20} | _DINOV3_GATED),
    "7b": (
        "7b16",
        {"embed_dim": 4096, "depth": 40, "num_heads": 32, "mlp_ratio": 2.0, "qkv_bias": False}
        | {"feed_forward": "swiglu", "mlp_multiple": 64},
    ),
}
_DINOV3_CONVNEXT: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}
# Bolya et al., Perception Encoder: rotary beside learned positions, a norm before the blocks.
_PE_ROTARY: dict[str, Any] = {"base": 10000.0, "coordinates": "cells", "pretrain_grid_cells": 32, "first": "columns"}
_PE_ROTARY |= {"pairs": "neighbours", "offset_cells": 1.0}
_PE = _vit(32, norm_eps=1e-5, rotary=_PE_ROTARY, class_token=True, patch_bias=False, embedding_norm=True)
_PE |= _HALVES
_PE_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "t": ("T16-512", {"embed_dim": 192, "depth": 12, "num_heads": 3}),
    "s": ("S16-512", _SMALL),
    "b": ("B16-512", _BASE),
    "l": ("L14-448", _LARGE),
    "g": (
        "G14-448",
        {"embed_dim": 1536, "depth": 50, "num_heads": 16, "mlp_ratio": 8960 / 1536, "class_token": False}
        | {"layer_scale_init": 0.1, "rotary": _PE_ROTARY | {"offset_cells": 0.0}},
    ),
}
# Fang et al., EVA-02: gated feed-forward, with a norm inside in the larger two.
_EVA = _vit(
    16,
    key_bias=False,
    mlp_ratio=4 * 2 / 3,
    feed_forward="swiglu",
    rotary={"base": 10000.0, "coordinates": "cells", "pretrain_grid_cells": 16, "pairs": "neighbours"},
    class_token=True,
    **_CLIP,
)
_EVA_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "ti": ("tiny_patch14_224.mim_in22k", {"embed_dim": 192, "depth": 12, "num_heads": 3}),
    "s": ("small_patch14_224.mim_in22k", _SMALL),
    "b": ("base_patch14_224.mim_in22k", _BASE | {"mlp_norm": True}),
    "l": ("large_patch14_224.mim_m38m", _LARGE | {"mlp_norm": True}),
}
# Tschannen et al., SigLIP 2.
_SO400M: dict[str, Any] = {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362}
_SIGLIP_SIZES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "b": ("base-patch16-512", 32, _BASE),
    "l": ("large-patch16-512", 32, _LARGE),
    "so400m": ("so400m-patch16-512", 32, _SO400M),
    "g": ("giant-opt-patch16-384", 24, {"embed_dim": 1536, "depth": 40, "num_heads": 16}),
}
# Ranzinger et al., RADIO: positions for 2048 px of which a crop is taken, class tokens of all teachers and registers.
_RADIO = _vit(128, position_resize="crop", patch_bias=False, **_CLIP)
_RADIO_HUGE: dict[str, Any] = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
_RADIO_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "radio_v3_b": ("C-RADIOv3-B", _BASE | {"register_tokens": 8}),
    "radio_v3_l": ("C-RADIOv3-L", _LARGE | {"register_tokens": 8}),
    "radio_v3_h": ("C-RADIOv3-H", _RADIO_HUGE | {"register_tokens": 8}),
    "radio_v4_so400m": ("C-RADIOv4-SO400M", _SO400M | {"register_tokens": 10}),
    "radio_v4_h": ("C-RADIOv4-H", _RADIO_HUGE | {"register_tokens": 10}),
}
# Carion et al., SAM 3: windows but for every eighth block, tiled positions.
_SAM3 = _vit(
    24,
    embed_dim=1024,
    depth=32,
    num_heads=16,
    mlp_ratio=4.625,
    norm_eps=1e-5,
    position_resize="tile",
    patch_bias=False,
    embedding_norm=True,
    window_size_tokens=((24,) * 7 + (0,)) * 4,
    rotary={"base": 10000.0, "coordinates": "cells", "pretrain_grid_cells": 24, "normalise": "longer"}
    | {"first": "columns", "pairs": "neighbours", "windows": "window"},
    released_as="facebook/sam3",
    **_HALVES,
)
# Chen et al., InternVL: the 224 px original has 48 blocks, its successors leave the last three out.
_INTERNVIT = _vit(32, layer_scale_init=0.1, position_class_slot=True, **_IMAGENET)
_INTERNVIT_6B: dict[str, Any] = {"embed_dim": 3200, "num_heads": 25, "norm": "rmsnorm", "qkv_bias": False}
_INTERNVIT_6B |= {"qk_norm": True}
_INTERNVIT_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "internvit_6b_224px": ("6B-224px", _INTERNVIT_6B | {"depth": 48, "pretrain_resolution_px": 256}),
    "internvit_6b_v1_2": ("6B-448px-V1-2", _INTERNVIT_6B | {"depth": 45}),
    "internvit_6b_v1_5": ("6B-448px-V1-5", _INTERNVIT_6B | {"depth": 45}),
    "internvit_6b_v2_5": ("6B-448px-V2_5", _INTERNVIT_6B | {"depth": 45}),
    "internvit_300m_v2_5": ("300M-448px-V2_5", _LARGE),
}

FOUNDATION_PRESETS: dict[str, dict[str, Any]] = {
    **{
        f"dinov3_{size}": _DINOV3 | numbers | {"released_as": f"facebook/dinov3-vit{name}-pretrain-lvd1689m"}
        for size, (name, numbers) in _DINOV3_SIZES.items()
    },
    **{
        f"dinov3_convnext_{size}": {"kind": "convnext", "depths": depths, "widths": widths}
        | _IMAGENET
        | {"released_as": f"facebook/dinov3-convnext-{size}-pretrain-lvd1689m"}
        for size, (depths, widths) in _DINOV3_CONVNEXT.items()
    },
    **{
        f"pe_spatial_{size}": _PE | numbers | {"released_as": f"facebook/PE-Spatial-{name}"}
        for size, (name, numbers) in _PE_SIZES.items()
    },
    **{
        f"eva02_{size}": _EVA | numbers | {"released_as": f"timm/eva02_{name}"}
        for size, (name, numbers) in _EVA_SIZES.items()
    },
    **{
        f"siglip2_{size}": _vit(cells, activation="gelu_tanh", **_HALVES)
        | numbers
        | {"released_as": f"google/siglip2-{name}"}
        for size, (name, cells, numbers) in _SIGLIP_SIZES.items()
    },
    **{
        name: _RADIO | numbers | {"released_as": f"nvidia/{released}"}
        for name, (released, numbers) in _RADIO_SIZES.items()
    },
    "sam3": _SAM3,
    **{
        name: _INTERNVIT | numbers | {"released_as": f"OpenGVLab/InternViT-{released}"}
        for name, (released, numbers) in _INTERNVIT_SIZES.items()
    },
}
