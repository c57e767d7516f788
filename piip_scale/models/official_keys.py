"""The names that released weights have for our parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from piip_scale.config.branches import BranchConfig, ConvNextBranchConfig
from piip_scale.config.model import PiipConfig
from piip_scale.errors import ModelError
from piip_scale.geometry import is_downsampling, locate
from piip_scale.logging import get_logger
from piip_scale.models.official_config import OfficialModel
from piip_scale.models.trunk import Trunk
from piip_scale.models.vit import relative_positions

_LOG = get_logger(__name__)
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "teacher",
    "state_dict",
    "module",
    "model",
    "weights",
)
"""What training codes call a network in a checkpoint; averages before what they are averages of, as timm takes them."""

Renames = tuple[tuple[str, str], ...]
"""Patterns and their replacements, all applied in order."""

_PLAIN_VIT: Renames = (
    (r"^embedding\.proj", "patch_embed.proj"),
    (r"^embedding\.position$", "pos_embed"),
    (r"^class_token\.token$", "cls_token"),
)
_GAMMAS: Renames = ((r"\.ls(\d)\.gamma$", r".gamma_\1"),)
_BRANCHES: dict[str, Renames] = {
    "deit": _PLAIN_VIT + _GAMMAS,
    "internvit": _PLAIN_VIT,
    "internvit_classifier": _PLAIN_VIT,
    "beit": (
        *_PLAIN_VIT,
        *_GAMMAS,
        (r"\.qv_bias\.query$", ".q_bias"),
        (r"\.qv_bias\.value$", ".v_bias"),
        (r"\.position_bias\.table$", ".relative_position_bias_table"),
    ),
    "perceiver": (
        *_GAMMAS,
        (r"^embedding\.proj", "visual_embed.patch_embed.proj"),
        (r"^embedding\.position$", "visual_embed.patch_embed.spatial_pos_embed.weight"),
        (r"^embedding\.frames$", "visual_embed.patch_embed.temporal_pos_embed.weight"),
        (r"^embedding\.norm", "visual_embed.embeddings_norm"),
        (r"^blocks\.", "layers."),
        (r"\.attn\.qkv\.", ".self_attn.in_proj."),
        (r"\.attn\.proj\.", ".self_attn.out_proj."),
        (r"\.mlp\.fc", ".linear"),
    ),
    "convnext": (
        (r"^embedding\.proj", "embeddings.patch_embeddings"),
        (r"^embedding\.norm", "embeddings.layernorm"),
        (r"\.downsample\.norm", ".downsampling_layer.0"),
        (r"\.downsample\.proj", ".downsampling_layer.1"),
        (r"(layers\.\d+)\.norm", r"\1.layernorm"),
        (r"\.mlp\.fc", ".pwconv"),
        (r"\.ls\.gamma$", ".layer_scale_parameter"),
        (r"^", "convnext_model."),
    ),
}
_UNIT: Renames = (
    (r"^project_to_small", "branch1to2_proj"),
    (r"^project_to_large", "branch2to1_proj"),
    (r"^inject_into_small", "branch1to2_injector"),
    (r"^inject_into_large", "branch2to1_injector"),
    (r"\.source_norm", ".feat_norm"),
    (r"\.attn\.offsets", ".attn.sampling_offsets"),
    (r"\.attn\.weights", ".attn.attention_weights"),
    (r"\.attn_scale\.gamma", ".ca_gamma"),
    (r"\.feed_forward\.scale\.gamma", ".cffn_gamma"),
    (r"\.feed_forward\.norm", ".ffn_norm"),
    (r"\.feed_forward\.dwconv", ".ffn.dwconv.dwconv"),
    (r"\.feed_forward\.", ".ffn."),
)
_DEFORM: Renames = ((r"\.attn\.value\.", ".attn.value_proj."), (r"\.attn\.proj\.", ".attn.output_proj."))
_CROSS: Renames = tuple((rf"\.attn\.{name}\.", f".attn.w{name[0]}.") for name in ("query", "key", "value"))
_LEVEL_NUMBER = {4.0: 1, 2.0: 2, 1.0: 3, 0.5: 4}
_POOLED_LAYER = {"0": "0", "1": "2", "2": "4"}
"""The released merging of the classifier holds permutations between its layers."""


def rename_official(model: Trunk, official: OfficialModel, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """A released state dict by our names, every key accounted for.

    Args:
        model: Our module, possibly on the meta device.
        official: What it was built from.
        state_dict: Released weights: bare, or inside ``state_dict`` or ``module``, with or without ``backbone.``.

    Raises:
        ModelError: A key is missing, unexpected or of another shape; all of them are listed.
    """
    left = unwrap(state_dict)
    problems, weights = [], {}
    for name, wanted in model.state_dict().items():
        key = official_name(name, official)
        tensor = left.pop(key, None)
        if tensor is None:
            problems.append(f"missing {key}")
        elif tensor.shape != wanted.shape and not same_but_for_batch(tensor, wanted):
            problems.append(f"{key} has shape {list(tensor.shape)}, expected {list(wanted.shape)}")
        else:
            weights[name] = tensor.reshape(wanted.shape)
    problems += [f"unexpected {key}" for key, tensor in left.items() if not is_unused(key, tensor, official)]
    if problems:
        raise ModelError("released weights do not fit their config", value=problems, rule="every key has one place")
    return weights


def official_name(name: str, official: OfficialModel) -> str:
    """The released name of one of our parameters."""
    part, _, rest = name.partition(".")
    if part == "branches":
        return _branch_name(rest, official)
    if part == "interactions":
        stage, pair, rest = rest.split(".", 2)
        attention = _DEFORM if official.config.interaction.attention == "deform" else _CROSS
        large = int(pair) + 1
        unit = f"interactions.{stage}.interaction_units_{large}{large + 1}"
        return f"{unit}.{rename(rest, _UNIT + attention)}"
    if part == "mergings":
        return _merging_name(rest, official.config)
    if part == "pyramid":
        return _level_name(rest, official.config)
    return _head_name(rest)


def official_kind(config: BranchConfig) -> str:
    """The released class whose names a branch's weights have."""
    if isinstance(config, ConvNextBranchConfig):
        return "convnext"
    if config.relative_position_bias:
        return "beit"
    if config.frame_positions:
        return "perceiver"
    return "internvit" if config.position_class_slot else "deit"


def official_branch_name(name: str, config: BranchConfig, kind: str) -> str:
    """The released name of a branch's own parameter, without the branch's prefix."""
    if isinstance(config, ConvNextBranchConfig):
        name = _convnext_layer(name, config)
    return rename(name, _BRANCHES[kind])


def _branch_name(rest: str, official: OfficialModel) -> str:
    index, rest = rest.split(".", 1)
    prefix = f"branch{int(index) + 1}." if len(official.kinds) > 1 else ""
    kind, config = official.kinds[int(index)], official.config.branches[int(index)]
    return prefix + official_branch_name(rest, config, kind)


def _convnext_layer(rest: str, config: ConvNextBranchConfig) -> str:
    match = re.match(r"blocks\.(\d+)\.", rest)
    if match is None:
        return rest
    block = int(match[1])
    stage, index = locate(config.sections, block)
    layer = "downsample" if is_downsampling(config.sections, block) else f"layers.{index - bool(stage)}"
    return f"encoder.stages.{stage}.{layer}.{rest[match.end() :]}"


def _merging_name(rest: str, config: PiipConfig) -> str:
    index, _, branch, kind, *layer = rest.split(".")
    number = int(branch) + 1
    stage = sorted(set(config.geometry.level_stages))[int(index)]
    prefix = "" if stage == config.interaction.num_stages - 1 else f"intermediate_merging_{stage}_"
    if kind == "weight":
        return f"{prefix}w{number}"
    middle = f"branch{number}" if prefix else f"merge_branch{number}"
    return f"{prefix}{middle}.{'.'.join(layer)}"


def _level_name(rest: str, config: PiipConfig) -> str:
    _, level, *layer = rest.split(".")
    number = int(level) + 1 if config.pyramid.kind == "regular" else _LEVEL_NUMBER[config.pyramid.scales[int(level)]]
    # The single-branch classes call their levels up1 ... up4.
    family = "fpn" if len(config.branches) > 1 else "up"
    return f"{family}{number}.{'.'.join(layer)}"


def _head_name(rest: str) -> str:
    part = re.match(r"parts\.(\d+)\.", rest)
    if part is not None:
        return f"branch{int(part[1]) + 1}." + rest[part.end() :].replace("linear.", "head.")
    merged = re.match(r"merging\.parts\.(\d+)\.(?:weight$|layers\.(\d+)\.)", rest)
    if merged is None:
        return f"cls_{rest.replace('linear.', 'head.')}"
    number = int(merged[1]) + 1
    if merged[2] is None:
        return f"w{number}"
    layer = "" if number == 1 else f"{_POOLED_LAYER[merged[2]]}."
    return f"merge_branch{number}.{layer}{rest[merged.end() :]}"


def rename(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """A name after all patterns of a table, in order."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """A network's tensors of a checkpoint, out of the wrappers around them; of a whole detector's its backbone's."""
    tensors = unwrap_whole(state_dict)
    backbone = {key.removeprefix("backbone."): v for key, v in tensors.items() if key.startswith("backbone.")}
    return backbone or tensors


def unwrap_whole(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, out of the wrappers that training codes put around them."""
    wrappers = [wrapper for wrapper in _WRAPPERS if isinstance(state_dict.get(wrapper), Mapping)]
    if wrappers:
        if len(wrappers) > 1:
            _LOG.info("the file has the networks %s: the first is taken", ", ".join(wrappers))
        return unwrap_whole(state_dict[wrappers[0]])
    return {str(key).removeprefix("module."): value for key, value in state_dict.items() if isinstance(value, Tensor)}


def same_but_for_batch(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether a released tensor only lacks a first axis of size 1 that ours has."""
    return wanted.ndim == tensor.ndim + 1 and wanted.shape[0] == 1 and tensor.shape == wanted.shape[1:]


def is_unused(key: str, tensor: Tensor, official: OfficialModel) -> bool:
    """Whether a released tensor, by its name in the network, is one that nothing computes with or that follows."""
    if key.startswith(official.unused):
        return True
    window = round(len(tensor) ** 0.5) if key.endswith(".relative_position_index") else 0
    return bool(window) and torch.equal(tensor, relative_positions(window, tensor.device))
