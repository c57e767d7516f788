"""The names that OpenGVLab's checkpoints have for all of a model: its network, and mmlab's neck and heads.

The released code stands on mmdet 2.25 and mmseg 0.x, which call the parts of R-CNNs and of UPerNet what the versions
here call them; a DINO was one head there, with a transformer inside, and is a detector of several parts here. Classes
have the same order and the background comes last in both.

Source: names and shapes read off OpenGVLab/PIIP's own copies of mmdet and mmseg.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from piip_scale.config.branches import ConvNextBranchConfig
from piip_scale.config.model import PiipConfig
from piip_scale.models.official_config import OfficialModel
from piip_scale.models.official_keys import (
    Renames,
    is_unused,
    official_kind,
    official_name,
    rename,
    same_but_for_batch,
)

_NETWORK = "backbone."
_HEADS = "heads."
_HEAD_NAMES: Renames = (
    (r"^heads\.(detector|heads)\.", ""),
    (r"^level_embed$", "bbox_head.transformer.level_embeds"),
    (r"^query_embedding\.", "bbox_head.transformer.query_embed."),
    (r"^memory_trans_fc\.", "bbox_head.transformer.enc_output."),
    (r"^memory_trans_norm\.", "bbox_head.transformer.enc_output_norm."),
    (r"^dn_query_generator\.label_embedding\.", "bbox_head.label_embedding."),
    (r"^(encoder|decoder)\.", r"bbox_head.transformer.\1."),
    (r"(transformer\.\w+\.layers\.\d+)\.self_attn\.", r"\1.attentions.0."),
    (r"(transformer\.\w+\.layers\.\d+)\.cross_attn\.", r"\1.attentions.1."),
    (r"(transformer\.\w+\.layers\.\d+)\.ffn\.", r"\1.ffns.0."),
    # A sequence there, which counts its activation too.
    (r"\.ref_point_head\.layers\.0\.", ".ref_point_head.0."),
    (r"\.ref_point_head\.layers\.1\.", ".ref_point_head.2."),
)
_WITHOUT_FIRST_AXIS = re.compile(r"\.spatial_pos_embed\.weight$|(^|[._])w\d+$")
"""A table of positions and the weights in a sum of branches; here the first axis of both is one of size 1."""
_LARGEST_SCALE = 4.0
_BRANCHES_WITH_UNUSED_LEVEL = 3


def released_network(config: PiipConfig) -> OfficialModel:
    """What the released code would call the parts of a network of ours.

    Args:
        config: The network; a classifier's head needs no more to be named.
    """
    kinds = tuple(official_kind(branch) for branch in config.branches)
    return OfficialModel(config, None, kinds, _unused(config))


def released_name(name: str, network: OfficialModel) -> str:
    """The released name of a parameter or buffer.

    Args:
        name: In the state dict of a detector, a segmentor or a classifier of ours.
        network: From ``released_network``.
    """
    if name.startswith(_NETWORK):
        return _NETWORK + official_name(name.removeprefix(_NETWORK), network)
    return rename(name, _HEAD_NAMES) if name.startswith(_HEADS) else official_name(name, network)


def released_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor of ours has under its released name; elements and their order are the same."""
    return shape[1:] if _WITHOUT_FIRST_AXIS.search(name) else shape


def from_released(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], config: PiipConfig) -> dict[str, Tensor]:
    """Released tensors by our names, in our shapes where only an axis of size 1 is between them.

    Args:
        tensors: By their released names.
        wanted: The model's state dict, on any device, for its names and shapes.
        config: The model's network.

    Returns:
        What has a place in the model, whether or not it fits it; and what is left over, by its released name, except
        for what the released code never reads.
    """
    network, left = released_network(config), dict(tensors)
    found = {}
    for name, like in wanted.items():
        tensor = left.pop(released_name(name, network), None)
        if tensor is not None:
            found[name] = tensor.reshape(like.shape) if same_but_for_batch(tensor, like) else tensor
    unread = [key for key, tensor in left.items() if is_unused(key.removeprefix(_NETWORK), tensor, network)]
    return found | {key: tensor for key, tensor in left.items() if key not in unread}


def is_released(names: Mapping[str, object], wanted: Mapping[str, Tensor], config: PiipConfig) -> bool:
    """Whether a file's names are released ones: those of a model's network would be among them."""
    network = released_network(config)
    first = next(iter(name for name in wanted if not name.startswith(_HEADS)), "")
    return first not in names and bool(first) and released_name(first, network) in names


def _unused(config: PiipConfig) -> tuple[str, ...]:
    """As in ``official_config``: what the released classes build and their forward pass leaves out."""
    several = len(config.branches) > 1
    norms = tuple(
        (f"branch{index + 1}." if several else "") + "convnext_model.layernorm."
        for index, branch in enumerate(config.branches)
        if isinstance(branch, ConvNextBranchConfig)
    )
    pyramid = config.pyramid
    leaves_out_level = pyramid.kind == "simple" and _LARGEST_SCALE not in pyramid.scales
    has_level = leaves_out_level and len(config.branches) == _BRANCHES_WITH_UNUSED_LEVEL
    return (*norms, "fpn1.") if has_level else norms
