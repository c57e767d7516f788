"""The names that files of foundation models have for our parameters, from their owners, timm and Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from piip_scale.config.branches import BranchConfig, ConvNextBranchConfig, VitBranchConfig
from piip_scale.models.joined import Joined, Value
from piip_scale.models.official_keys import Renames, rename

_WRAPPERS = (
    r"detector\.backbone\.vision_backbone\.trunk\.",
    r"(detector_model\.)?vision_encoder\.backbone\.",
    r"radio_model\.model\.",
    r"base_model\.",
    r"(model\.)?vision_tower\.(vision_model\.)?",
    r"(model\.)?vision_model\.",
    r"visual\.(trunk\.)?",
)
"""What the backbone is called inside a larger model; what lies beside it there is of no use here."""


@dataclass(frozen=True)
class _Format:
    """One way to call a backbone's tensors.

    Attributes:
        sign: Found in a name that only such files have.
        renames: Their names to ours.
    """

    sign: str
    renames: Renames


_GAMMAS: Renames = ((r"\.gamma_(\d)$", r".ls\1.gamma"), (r"\.(lambda|layer_scale)_?(\d)(\.lambda1)?$", r".ls\2.gamma"))
_LAYERS: Renames = (
    (r"^(encoder\.|model\.)?layers?\.(?=\d)", "blocks."),
    (r"\.(layer_?norm_?before|layer_norm1)\.", ".norm1."),
    (r"\.(layer_?norm_?after|layer_norm2)\.", ".norm2."),
    (r"\.(attention|self_attn)\.", ".attn."),
    (r"\.attn\.(o_proj|out_proj|projection_layer)\.", ".attn.proj."),
    *_GAMMAS,
)
_GATED: Renames = (
    (r"\.mlp\.(w1|fc1_g|gate_proj)\.", ".mlp.gate."),
    (r"\.mlp\.(w2|fc1_x)\.", ".mlp.value."),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.(w3|down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
)
_PLAIN: Renames = (
    (r"^patch_embed\.", "embedding."),
    (r"^pos_embed$", "embedding.position"),
    (r"^cls_token$", "class_token.token"),
    (r"^(storage_tokens|reg_token)$", "registers.token"),
    (r"^(norm_pre|ln_pre)\.", "embedding.norm."),
    (r"\.attn\.([qkv])_bias$", r".attn.\1_proj.bias"),
    *_GAMMAS,
    *_GATED,
)
_FORMATS = (
    # Perception Encoder's own.
    _Format(
        r"^transformer\.resblocks\.",
        (
            (r"^conv1\.", "embedding.proj."),
            (r"^class_embedding$", "class_token.token"),
            (r"^positional_embedding$", "embedding.position"),
            (r"^ln_pre\.", "embedding.norm."),
            (r"^transformer\.resblocks\.", "blocks."),
            (r"\.ln_(\d)\.", r".norm\1."),
            (r"\.ls_(\d)\.gamma$", r".ls\1.gamma"),
            (r"\.attn\.in_proj_", ".attn.qkv."),
            (r"\.attn\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.c_fc\.", ".mlp.fc1."),
            (r"\.mlp\.c_proj\.", ".mlp.fc2."),
        ),
    ),
    # RADIO's own.
    _Format(
        r"^patch_generator\.",
        (
            (r"^patch_generator\.embedder\.", "embedding.proj."),
            (r"^patch_generator\.pos_embed$", "embedding.position"),
            (r"^patch_generator\.cls_token\.token$", "registers.token"),
            (r"\.ls(\d)\.grandma$", r".ls\1.gamma"),
        ),
    ),
    # Hugging Face's RADIO.
    _Format(
        r"^embeddings\.cls_register_token$",
        (
            (r"^embeddings\.patch_projection\.", "embedding.proj."),
            (r"^embeddings\.position_embedding$", "embedding.position"),
            (r"^embeddings\.cls_register_token$", "registers.token"),
            *_LAYERS,
            *_GATED,
        ),
    ),
    # Hugging Face's DINOv3.
    _Format(
        r"^embeddings\.register_tokens$",
        (
            (r"^embeddings\.patch_embeddings\.", "embedding.proj."),
            (r"^embeddings\.cls_token$", "class_token.token"),
            (r"^embeddings\.register_tokens$", "registers.token"),
            *_LAYERS,
            *_GATED,
        ),
    ),
    # Hugging Face's SAM 3 and InternViT.
    _Format(
        r"^embeddings\.patch_embeddings\.projection\.",
        (
            (r"^embeddings\.patch_embeddings\.projection\.", "embedding.proj."),
            (r"^embeddings\.position_embeddings$", "embedding.position"),
            (r"^embeddings\.cls_token$", "class_token.token"),
            (r"^layer_norm\.", "embedding.norm."),
            *_LAYERS,
        ),
    ),
    # InternViT's own code on the hub.
    _Format(
        r"^embeddings\.class_embedding$",
        (
            (r"^embeddings\.patch_embedding\.", "embedding.proj."),
            (r"^embeddings\.position_embedding$", "embedding.position"),
            (r"^embeddings\.class_embedding$", "class_token.token"),
            (r"^encoder\.layers\.", "blocks."),
            (r"\.ls(\d)$", r".ls\1.gamma"),
        ),
    ),
    # Hugging Face's SigLIP.
    _Format(
        r"^embeddings\.position_embedding\.weight$",
        (
            (r"^embeddings\.patch_embedding\.", "embedding.proj."),
            (r"^embeddings\.position_embedding\.weight$", "embedding.position"),
            *_LAYERS,
        ),
    ),
    # DINOv3's, EVA-02's and SAM 3's own, and timm's of all these.
    _Format(
        r"^(storage_tokens|reg_token|norm_pre\.|ln_pre\.)|\.attn\.[qkv]_(bias|proj\.)|\.mlp\.(w12|w1|fc1_g)\.", _PLAIN
    ),
    # ConvNeXt: DINOv3's own, Hugging Face's and timm's.
    _Format(
        r"^(downsample_layers|(model\.)?stages\.\d+\.downsample_layers|stem)\.\d",
        (
            (r"^model\.", ""),
            (r"^(downsample_layers\.0|stages\.0\.downsample_layers|stem)\.0\.", "embedding.proj."),
            (r"^(downsample_layers\.0|stages\.0\.downsample_layers|stem)\.1\.", "embedding.norm."),
            (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
            (r"^(stages\.\d+)\.downsample_layers\.", r"\1.downsample."),
            (r"^(stages\.\d+)\.(layers|blocks)\.", r"\1."),
            (r"^(stages\.\d+\.downsample)\.0\.", r"\1.norm."),
            (r"^(stages\.\d+\.downsample)\.1\.", r"\1.proj."),
            (r"\.(depthwise_conv|conv_dw)\.", ".dwconv."),
            (r"^(stages\.\d+\.\d+)\.layer_norm\.", r"\1.norm."),
            (r"\.(pointwise_conv|pwconv)(\d)\.", r".mlp.fc\2."),
            (r"\.gamma$", ".ls.gamma"),
        ),
    ),
)
_UNUSED = re.compile(
    r"(^|\.)mask_token$|^(norm|norms|fc_norm|head|classifier|attn_pool|post_layernorm|layernorm|ln_post|proj|lm_head)\b"
    r"|^(local_cls_norm|projectors|summary_idxs|input_conditioner|embeddings\.video_patch_projection)\b"
    r"|^patch_generator\.|rope|freqs_cis|\.bias_mask$|^layer_norm\."
)
"""Heads, pretraining's own parts, and tables that follow from the numbers."""
KEY_BIAS = "key_bias"
"""Behind an attention's name: a bias for keys where a branch has none."""
_COLOURS = 3
_LINEAR = 2
"""Axes of a projection's weight where patches are not a convolution's."""


def foundation_names(tensors: Mapping[str, Tensor], config: BranchConfig) -> dict[str, Value] | None:
    """A foundation model's tensors by our names, what a branch has no place for left out.

    Args:
        tensors: By the names of their file.
        config: The branch.

    Returns:
        ``None`` where the file is none of theirs; else tensors, the projections of queries, keys and values joined.
        Positions still have the slots of tokens before the cells, which are already in those tokens.
        So has a bias for keys that the branch has none of, unless it is zero.
    """
    inside = _unwrapped(tensors)
    form = next((form for form in _FORMATS if any(re.search(form.sign, name) for name in inside)), None)
    if form is None or (isinstance(config, VitBranchConfig) and config.relative_position_bias):
        return None
    named: dict[str, Value] = {}
    for name, tensor in inside.items():
        renamed = rename(name, form.renames)
        named[_convnext_name(renamed, config) if isinstance(config, ConvNextBranchConfig) else renamed] = tensor
    if isinstance(config, VitBranchConfig):
        _fit_parts(named, config)
    return {name: value for name, value in named.items() if not _UNUSED.search(name)}


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        inside = {name[match.end() :]: value for name, value in tensors.items() if (match := re.match(wrapper, name))}
        if inside:
            return _unwrapped(inside)
    return dict(tensors)


def _convnext_name(name: str, config: ConvNextBranchConfig) -> str:
    match = re.match(r"stages\.(\d+)\.(downsample|\d+)\.", name)
    if match is None:
        return name
    stage = int(match[1])
    # Each stage but the first opens with its downsampling.
    first = sum(config.depths[:stage]) + stage - 1
    block = first if match[2] == "downsample" else first + 1 + int(match[2])
    return f"blocks.{block}.{name[match.end() :]}"


def _fit_parts(named: dict[str, Value], config: VitBranchConfig) -> None:
    """Joins and parts tensors until they are those of a branch."""
    for block in range(config.depth):
        prefix = f"blocks.{block}."
        _join_projections(named, f"{prefix}attn.", config)
        _name_feed_forward(named, f"{prefix}mlp.", gated=config.feed_forward == "swiglu")
        for scale in ("ls1.gamma", "ls2.gamma"):
            # Hugging Face writes scales of 1 where the model has none.
            if config.layer_scale_init is None and bool((_tensor(named, prefix + scale) == 1).all()):
                named.pop(prefix + scale, None)
    _add_slots(named, config)
    kernel = named.get("embedding.proj.weight")
    if isinstance(kernel, Tensor) and kernel.ndim == _LINEAR:
        side = round((kernel.shape[1] / _COLOURS) ** 0.5)
        named["embedding.proj.weight"] = kernel.unflatten(1, (_COLOURS, side, side))


def _join_projections(named: dict[str, Value], prefix: str, config: VitBranchConfig) -> None:
    weights = [named.pop(f"{prefix}{part}_proj.weight", None) for part in "qkv"]
    if all(isinstance(part, Tensor) for part in weights):
        named[f"{prefix}qkv.weight"] = Joined(tuple(part for part in weights if isinstance(part, Tensor)))
    query, key, value = _biases(named, prefix)
    if query is None or value is None:
        return
    key = torch.zeros_like(query) if key is None else key
    if config.key_bias:
        named[f"{prefix}qkv.bias"] = torch.cat((query, key, value))
        return
    # DINOv3 masks its bias for keys: what its file has there was never used.
    if f"{prefix}qkv.bias_mask" not in named and bool(key.any()):
        named[f"{prefix}{KEY_BIAS}"] = key
    named |= {f"{prefix}qv_bias.query": query, f"{prefix}qv_bias.value": value}


def _biases(named: dict[str, Value], prefix: str) -> list[Tensor | None]:
    fused = named.pop(f"{prefix}qkv.bias", None)
    if isinstance(fused, Tensor):
        return list(fused.chunk(3))
    found = [named.pop(f"{prefix}{part}_proj.bias", None) for part in "qkv"]
    return [part if isinstance(part, Tensor) else None for part in found]


def _name_feed_forward(named: dict[str, Value], prefix: str, gated: bool) -> None:
    for kind in ("weight", "bias"):
        # Hugging Face calls a gated one's second layer as a plain one's first.
        up = named.pop(f"{prefix}up_proj.{kind}", None)
        if up is not None:
            named[f"{prefix}{'value' if gated else 'fc1'}.{kind}"] = up
        packed = named.get(f"{prefix}fc1.{kind}")
        if gated and isinstance(packed, Tensor):
            del named[f"{prefix}fc1.{kind}"]
            named[f"{prefix}gate.{kind}"], named[f"{prefix}value.{kind}"] = packed.chunk(2)


def _add_slots(named: dict[str, Value], config: VitBranchConfig) -> None:
    """Adds the positions that tokens before the cells have to those tokens, once and for all."""
    position, token = named.get("embedding.position"), named.get("class_token.token")
    if not config.class_token or not isinstance(position, Tensor) or not isinstance(token, Tensor):
        return
    positions_1NC = position.reshape(1, -1, position.shape[-1])
    if positions_1NC.shape[1] != int(positions_1NC.shape[1] ** 0.5) ** 2:
        named["class_token.token"] = token.reshape(1, 1, -1) + positions_1NC[:, :1]


def _tensor(named: Mapping[str, Value], name: str) -> Tensor:
    value = named.get(name)
    return value if isinstance(value, Tensor) else torch.zeros(1)
