"""Released configs in our terms. What each class of the released code takes for granted stands here, and only here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import ValidationError

from piip_scale.config.model import ClassifierConfig, PiipConfig
from piip_scale.errors import ConfigError

Arguments = dict[str, Any]

_VIT: Arguments = {
    "patch_size": 16,
    "pretrain_img_size": 224,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "drop_path_rate": 0.0,
    "window_attn": False,
    "window_size": 14,
    "with_cp": False,
    "use_flash_attn": False,
    "with_fpn": False,
}
_INTERNVIT: Arguments = _VIT | {"embed_dim": 3200, "depth": 48, "num_heads": 25, "qkv_bias": False, "with_cp": True}
_DEFAULTS: dict[str, Arguments] = {
    "deit": _VIT | {"qkv_bias": False, "init_scale": 1e-4, "Mlp_block": "mlp"},
    "internvit": _INTERNVIT
    | {"patch_size": 14, "init_values": 0.1, "qk_normalization": True, "norm_layer_type": "RMSNorm"}
    | {"mlp_type": "regular"},
    "internvit_classifier": _INTERNVIT
    | {"init_values": None, "qk_normalization": False, "norm_layer_type": "ln", "mlp_type": "regular"},
    "beit": _VIT | {"pretrain_img_size": 512, "qkv_bias": False, "init_values": None, "use_abs_pos_emb": False},
    "perceiver": _VIT,
    "convnext": {"drop_path_rate": 0.0, "downsample_ratios": None, "hf_config": None, "pretrained": ""}
    | {"with_simple_fpn": False},
}
"""Defaults of the released constructors' arguments that matter, by the class of a branch."""

_NETWORK: Arguments = {
    "n_points": 4,
    "deform_num_heads": 6,
    "with_cffn": False,
    "cffn_ratio": 0.25,
    "deform_ratio": 1.0,
    "interact_attn_type": "normal",
    "interaction_drop_path_rate": 0.3,
    "interaction_proj": True,
    "norm_layer": "layernorm",
    "is_dino": False,
    "with_simple_fpn": True,
    "out_interaction_indexes": (),
    "num_classes": 1000,
    "separate_head": False,
}
_WITHOUT_EFFECT = {
    "type",
    "_delete_",
    "pretrained",
    "pretrain_patch_size",
    "cal_flops",
    "output_dtype",
    "layerscale_force_fp32",
    "out_indices",
    "use_rel_pos_bias",
    "single_branch",
}
_ONLY_SUPPORTED: Arguments = {
    "drop_rate": 0,
    "attn_drop_rate": 0,
    "use_simple_fpn": True,
    "with_final_norm": False,
    "use_cls_head": True,
    "use_shared_rel_pos_bias": False,
}
_CONVNEXT_SIZES: dict[str, Arguments] = {
    "tiny": {"depths": (3, 3, 9, 3), "hidden_sizes": (96, 192, 384, 768)},
    "small": {"depths": (3, 3, 27, 3), "hidden_sizes": (96, 192, 384, 768)},
    "base": {"depths": (3, 3, 27, 3), "hidden_sizes": (128, 256, 512, 1024)},
    "large": {"depths": (3, 3, 27, 3), "hidden_sizes": (192, 384, 768, 1536)},
}
_SINGLE_KINDS = {
    "vit_models": "deit",
    "InternViT6B": "internvit",
    "BEiT": "beit",
    "UnifiedBertEncoder": "perceiver",
    "ConvNextHFWrapper": "convnext",
}
_CLASSIFIER_KINDS = {"deit": "deit", "augreg": "internvit_classifier"}
_LEVELS = (4.0, 2.0, 1.0, 0.5)


@dataclass(frozen=True)
class OfficialModel:
    """A released network.

    Attributes:
        config: The network in our terms.
        head: Its classification head, ``None`` for dense prediction.
        kinds: The released class of each branch: ``deit``, ``internvit``, ``internvit_classifier``, ``beit``,
            ``perceiver`` or ``convnext``.
        unused: Patterns of the released state dict's keys that nothing in the released forward reads.
    """

    config: PiipConfig
    head: ClassifierConfig | None
    kinds: tuple[str, ...]
    unused: tuple[str, ...] = ()


def read_official_config(backbone_config: Mapping[str, Any]) -> OfficialModel:
    """A released backbone dict in our terms.

    Args:
        backbone_config: See ``models.official.from_official``.

    Raises:
        ConfigError: A key is missing or unknown, or has a value the family does not have.
    """
    names = sorted(name for name in backbone_config if name.startswith("branch"))
    try:
        if not names:
            return _read_single(backbone_config)
        network = _arguments("backbone", _without(backbone_config, *names), _NETWORK)
        branches = [dict(backbone_config[name]) for name in names]
        read = _read_network if "real_size" in branches[0] else _read_classifier
        return read(network, branches)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError("released config does not fit", value=first["loc"], rule=first["msg"]) from None


def _read_single(backbone: Mapping[str, Any]) -> OfficialModel:
    name = backbone.get("type")
    if name not in _SINGLE_KINDS:
        raise ConfigError("released config: type", value=name, rule=f"one of {', '.join(_SINGLE_KINDS)}")
    kind = _SINGLE_KINDS[name]
    given = _without(backbone, "img_size", "real_size")
    branch = _READERS[kind](_arguments("backbone", given, _DEFAULTS[kind]))
    branch["resolution_px"] = backbone.get("real_size") or backbone.get("img_size") or branch["pretrain_resolution_px"]
    if kind != "convnext":
        # These classes take every level from the last of out_indices.
        simple = {"scales": _LEVELS if backbone.get("with_fpn", False) else (1.0,), "norm": "layernorm"}
        return OfficialModel(_config([branch], {"num_stages": 1}, simple), None, (kind,))
    stages = len(branch["depths"])
    branch["blocks_per_stage"] = tuple(depth + (index > 0) for index, depth in enumerate(branch["depths"]))
    pyramid = {"kind": "regular", "scales": (1.0,) * stages, "stages": tuple(range(stages))}
    config = _config([branch], {"num_stages": stages}, pyramid)
    return OfficialModel(config, None, (kind,), ("convnext_model.layernorm.",))


def _read_network(network: Arguments, branches: list[Arguments]) -> OfficialModel:
    if len(branches) == 4:
        # The released four-branch class builds branch 4 from branch 3's arguments, and its weights have that shape.
        branches[3] = branches[2] | {name: branches[3][name] for name in ("real_size", "interaction_indexes")}
    kinds = tuple(_kind_of(branch) for branch in branches)
    read = [
        _read_branch(index, branch, kind, "real_size")
        for index, (branch, kind) in enumerate(zip(branches, kinds, strict=True))
    ]
    num_stages = len(read[0]["blocks_per_stage"])
    config = _config(read, _interaction(network, num_stages), _pyramid(network, kinds[-1], num_stages))
    return OfficialModel(config, None, kinds, _unused(network, kinds))


def _read_classifier(network: Arguments, branches: list[Arguments]) -> OfficialModel:
    kinds = tuple(_CLASSIFIER_KINDS[branch.pop("model_type", "deit")] for branch in branches)
    # The heads of the branches never hear of the network's num_classes.
    own_classes = {branch.pop("num_classes", 1000) for branch in branches}
    tokens = [branch.pop("use_cls_token", True) for branch in branches]
    read = [
        _read_branch(index, branch, kind, "img_size") | {"class_token": token, "drop_path_schedule": "constant"}
        for index, (branch, kind, token) in enumerate(zip(branches, kinds, tokens, strict=True))
    ]
    # Position embeddings are as large as the image here, not as in pretraining.
    read = [branch | {"pretrain_resolution_px": branch["resolution_px"]} for branch in read]
    config = _config(read, _interaction(network, len(read[0]["blocks_per_stage"])), {})
    separate = network["separate_head"]
    head = ClassifierConfig(num_classes=own_classes.pop() if separate else network["num_classes"], separate=separate)
    return OfficialModel(config, head, kinds)


def _config(branches: list[Arguments], interaction: Arguments, pyramid: Arguments) -> PiipConfig:
    return PiipConfig.model_validate({"branches": tuple(branches), "interaction": interaction, "pyramid": pyramid})


def _read_branch(index: int, branch: Arguments, kind: str, size: str) -> Arguments:
    where = f"branch{index + 1}"
    for name in (size, "interaction_indexes"):
        if name not in branch:
            raise ConfigError(f"released config: {where} has no {name}", rule="every branch needs one")
    given = _without(branch, "real_size", "img_size", "interaction_indexes")
    read = _READERS[kind](_arguments(where, given, _DEFAULTS[kind]))
    blocks = _blocks_per_stage(where, branch["interaction_indexes"])
    return read | {"resolution_px": branch[size], "blocks_per_stage": blocks}


def _blocks_per_stage(where: str, indexes: list[list[int]]) -> tuple[int, ...]:
    ends = [-1, *(last for _, last in indexes)]
    if [first for first, _ in indexes] != [end + 1 for end in ends[:-1]]:
        raise ConfigError(f"released config: {where}.interaction_indexes", value=indexes, rule="no block is left out")
    return tuple(after - before for before, after in pairwise(ends))


def _interaction(network: Arguments, num_stages: int) -> Arguments:
    return {
        "num_stages": num_stages,
        "attention": {"deform": "deform", "normal": "cross"}[network["interact_attn_type"]],
        "num_heads": network["deform_num_heads"],
        "num_points": network["n_points"],
        "value_ratio": float(network["deform_ratio"]),
        "ffn_ratio": float(network["cffn_ratio"]) if network["with_cffn"] else 0.0,
        "projection": network["interaction_proj"],
        "norm": network["norm_layer"],
        "drop_path_rate": float(network["interaction_drop_path_rate"]),
    }


def _pyramid(network: Arguments, last_kind: str, num_stages: int) -> Arguments:
    if network["with_simple_fpn"]:
        return {"scales": _LEVELS[1:] if network["is_dino"] else _LEVELS}
    stages = (*network["out_interaction_indexes"], num_stages - 1)
    # A ConvNeXt's own strides fall from level to level; a transformer's grid has to be resized.
    scales = (1.0,) * len(stages) if last_kind == "convnext" else _LEVELS
    return {"kind": "regular", "scales": scales, "stages": stages}


def _unused(network: Arguments, kinds: tuple[str, ...]) -> tuple[str, ...]:
    unused = [f"branch{i + 1}.convnext_model.layernorm." for i, kind in enumerate(kinds) if kind == "convnext"]
    # Only the three-branch class builds the level that DINO detectors leave out.
    return (*unused, "fpn1.") if network["is_dino"] and len(kinds) == 3 else tuple(unused)


def _kind_of(branch: Arguments) -> str:
    pretrained = branch.get("pretrained") or ""
    return next((kind for kind in ("deit", "beit", "perceiver", "convnext") if kind in pretrained), "internvit")


def _deit(given: Arguments) -> Arguments:
    windows = _windows(given)
    if any(windows) and not given["use_flash_attn"]:
        raise ConfigError(
            "released config: use_flash_attn",
            value=False,
            rule="with windows the released DeiT class then pads after qkv, which no released recipe does",
        )
    scale = float(given["init_scale"])
    return _vit(given) | {"layer_scale_init": scale, "activation": _activation(given["Mlp_block"])}


def _internvit(given: Arguments) -> Arguments:
    start = given["init_values"]
    return _vit(given) | {
        "layer_scale_init": float(start) if start else None,
        "norm": "rmsnorm" if given["norm_layer_type"] == "RMSNorm" else "layernorm",
        "qk_norm": given["qk_normalization"],
        "position_class_slot": True,
        "activation": _activation(given["mlp_type"]),
        "drop_path_schedule": "linear",
    }


def _beit(given: Arguments) -> Arguments:
    start = given["init_values"]
    return _vit(given) | {
        "layer_scale_init": None if start is None else float(start),
        "key_bias": False,
        "position_embedding": given["use_abs_pos_emb"],
        "relative_position_bias": True,
        "drop_path_schedule": "linear",
    }


def _perceiver(given: Arguments) -> Arguments:
    return _vit(given) | {
        "norm_eps": 1e-5,
        "layer_scale_init": 0.0,
        "embedding_norm": True,
        "frame_positions": 8,
        "drop_path_schedule": "linear",
    }


def _convnext(given: Arguments) -> Arguments:
    if given["with_simple_fpn"]:
        raise ConfigError("released config: with_simple_fpn", value=True, rule="a ConvNeXt has levels of its own")
    name = given["pretrained"]
    sizes = given["hf_config"] or next((s for size, s in _CONVNEXT_SIZES.items() if size in name), None)
    if sizes is None:
        raise ConfigError("released config: pretrained", value=name, rule=f"one of {', '.join(_CONVNEXT_SIZES)}")
    return {
        "kind": "convnext",
        "depths": tuple(sizes["depths"]),
        "widths": tuple(sizes["hidden_sizes"]),
        "drop_path_rate": float(given["drop_path_rate"] or 0),
    }


def _vit(given: Arguments) -> Arguments:
    windows = _windows(given)
    return {
        "embed_dim": given["embed_dim"],
        "depth": given["depth"],
        "num_heads": given["num_heads"],
        "mlp_ratio": float(given["mlp_ratio"]),
        "patch_size_px": given["patch_size"],
        "pretrain_resolution_px": given["pretrain_img_size"],
        "qkv_bias": given.get("qkv_bias", True),
        "window_size_tokens": windows if any(windows) else (),
        "drop_path_rate": float(given["drop_path_rate"]),
        "checkpoint_blocks": given["with_cp"],
    }


def _windows(given: Arguments) -> tuple[int, ...]:
    def per_block(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value] * given["depth"]

    windowed, sizes = per_block(given["window_attn"]), per_block(given["window_size"])
    return tuple(size if on else 0 for on, size in zip(windowed, sizes, strict=True))


def _activation(mlp: str) -> str:
    return "gelu_tanh" if mlp == "fused_mlp" else "gelu"


def _arguments(where: str, given: Mapping[str, Any], defaults: Arguments) -> Arguments:
    """The given arguments over the released defaults; anything that would be silently ignored raises."""
    for name, value in _ONLY_SUPPORTED.items():
        if given.get(name, value) != value:
            raise ConfigError(f"released config: {where}.{name}", value=given[name], rule=f"only {value} is supported")
    unknown = sorted(set(given) - set(defaults) - _WITHOUT_EFFECT - set(_ONLY_SUPPORTED))
    if unknown:
        raise ConfigError(f"released config: unknown keys in {where}", value=unknown)
    return defaults | dict(given)


def _without(values: Mapping[str, Any], *names: str) -> Arguments:
    return {name: value for name, value in values.items() if name not in names}


_READERS: dict[str, Callable[[Arguments], Arguments]] = {
    "deit": _deit,
    "internvit": _internvit,
    "internvit_classifier": _internvit,
    "beit": _beit,
    "perceiver": _perceiver,
    "convnext": _convnext,
}
