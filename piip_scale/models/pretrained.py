"""Backbones' own released weights as the start of a branch.

Understood are the files of DeiT, DeiT III, MAE, BEiT v2, DINOv2, AugReg (``.npz`` or converted), Uni-Perceiver
(converted by ViT-Adapter), InternViT (original, and Hugging Face's, sharded or not), Hugging Face's ConvNeXt, and
those of the foundation models that ``models.foundation_keys`` knows.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from piip_scale.config.branches import BranchConfig, ConvNextBranchConfig, VitBranchConfig
from piip_scale.config.model import PiipConfig
from piip_scale.errors import ModelError
from piip_scale.files import LACKS_MEMORY_FIX, lacks_memory
from piip_scale.geometry import depth_of
from piip_scale.logging import get_logger
from piip_scale.models.backbone_in import backbone_in, name_it_deserves, not_floats, require_values
from piip_scale.models.foundation_keys import KEY_BIAS, foundation_names
from piip_scale.models.joined import Value, Weights
from piip_scale.models.misfits import describe_misfits
from piip_scale.models.official_keys import official_branch_name, official_kind, unwrap
from piip_scale.models.position_tables import resize_position_table
from piip_scale.models.trunk import Trunk
from piip_scale.ops.resize import at_least_float32, resize_position

_LOG = get_logger(__name__)
_CONVNEXT = re.compile(r"^(convnext\.)?(?=embeddings\.patch_embeddings|embeddings\.layernorm|encoder\.stages)")
"""What Hugging Face's names of ConvNeXt begin with, and those of the released PIIP code with ``convnext_model``."""
_NOT_OF_A_BRANCH = re.compile(
    r"^(cls_token|class_token\.token$|attn_pool\.|mask_token|norm\.|fc_norm\.|head|pre_logits\.|decoder|clip_projector\.|classifier\.)"
    r"|^(convnext\.)?layernorm\.|relative_position_index$|^rel_pos_bias\."
)
"""What a classifier or a pretraining task has beyond the blocks."""
_MAY_BE_ABSENT = re.compile(r"\.ls\d\.gamma$|^class_token\.|\.qv_bias\.|\.lora\.|\.weight_scale$")
"""Scales that this pretraining had none of start at the config's value, biases and additions to a branch at zero;
scales of weights that are stored in 8 bits follow from these."""
_LAYER_SCALE = re.compile(r"\.ls\d\.gamma$")
_SHARD_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*\.(safetensors|bin|pth|pt)")
"""What an index may name: from wherever the folder came, never a way out of it."""
_RECORDS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace]
"""What training codes save beside tensors (RADIO, MAE) and what runs nothing when it is read: plain values by name."""
_KEYS_SHOWN = 5
_JAX_BLOCK = "Transformer/encoderblock_"
_PICKLE, _ZIP, _START_BYTES = b"\x80", b"PK", 40
_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


def pretrained_weights(trunk: Trunk) -> Weights:
    """The weights that a network's config names files for its branches.

    Tensors that need no resizing are mapped from their files: whoever takes a slice of one reads no more than that.

    Args:
        trunk: A network, on any device, sharded or not.

    Returns:
        Tensors by the network's own names and shapes, in the files' dtypes; parameters without any start afresh.

    Raises:
        ModelError: A file is absent or not readable, or does not fit its branch.
    """
    found: dict[str, Value] = {}
    for index, (branch, config) in enumerate(zip(trunk.branches, trunk.config.branches, strict=True)):
        if config.pretrained is not None:
            weights = branch_weights(branch, config, Path(config.pretrained))
            found |= weights.below(f"branches.{index}.")
    return Weights(found)


def check_pretrained(config: PiipConfig) -> None:
    """Raises a ``ModelError`` where a file that a training would start from is absent; reads no tensors."""
    if config.pretrained is not None:
        files: list[tuple[str | None, str | None]] = [(config.pretrained, None)]
    else:
        files = [(branch.pretrained, branch.released_as) for branch in config.branches]
    for named, released_as in files:
        if named is not None:
            _require_files(Path(named), released_as)


def _require_files(path: Path, released_as: str | None) -> None:
    """Raises a ``ModelError`` where a file is absent, or one of those that an index names; reads no tensors."""
    if not path.exists():
        raise _absent(path, released_as)
    file = weights_in(path, released_as) if path.is_dir() else path
    shards = indexed_files(file) if file.suffix == ".json" else []
    for shard in shards:
        if not (file.parent / shard).is_file():
            raise _absent(file.parent / shard, released_as)


def branch_weights(branch: nn.Module, config: BranchConfig, path: Path) -> Weights:
    """A file's weights by a branch's own names; position embeddings, tables and patch kernels are resized to it.

    Raises:
        ModelError: The file is absent or not readable, or does not fit the branch.
    """
    _require_files(path, config.released_as)
    weights = _read_jax(path, config) if path.suffix == ".npz" else backbone_in(read_weights(path))
    fitted = fit_weights(weights, branch.state_dict(), config, path.name)
    fresh = sorted(set(branch.state_dict()) - set(fitted))
    if fresh:
        _LOG.info("%s has no %s: they start afresh", path.name, ", ".join(fresh[:3]) + (" ..." if fresh[3:] else ""))
    return fitted


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, a Hugging Face index of shards, or a folder with either; mapped into memory, not read.

    Pickles of before torch 1.6 cannot be mapped: those are read whole, by every rank that asks.

    Args:
        path: ``.safetensors``, a pickle of tensors (``.pth``, ``.pt``, ``.bin``), ``*.index.json``, or a folder.

    Raises:
        ModelError: The file is absent, damaged, without tensors, or a pickle that would run code.
    """
    if path.is_dir():
        path = weights_in(path)
    if not path.is_file():
        raise _absent(path)
    if path.suffix == ".json":
        shards = indexed_files(path)
        return {name: tensor for shard in shards for name, tensor in read_weights(path.parent / shard).items()}
    if path.suffix == ".safetensors":
        return _map_safetensors(path)
    content = load_pickle(path)
    tensors = unwrap(content)
    if not tensors:
        keys = ", ".join(map(str, list(content)[:_KEYS_SHOWN])) or "nothing"
        raise ModelError(
            "pretrained weights: no tensors in the file",
            value=str(path),
            rule=f"it holds {keys}",
            fix="save the network's state dict alone",
        )
    require_values(tensors, path.name)
    return tensors


def load_pickle(path: Path) -> Mapping[str, Any]:
    """A pickle's content, its tensors mapped into memory where the file allows it.

    Raises:
        ModelError: It is damaged or no dict, or would run code.
    """
    can_map = zipfile.is_zipfile(path)
    start = _start_of(path)
    if not can_map and not start.startswith(_PICKLE):
        # torch would call a page or a pointer in the file's place a pickle that runs code.
        raise _unreadable(path, ValueError("it is cut off" if start.startswith(_ZIP) else "it is no pickle"))
    try:
        with torch.serialization.safe_globals(_RECORDS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    except pickle.UnpicklingError as error:
        named = re.search(r"\bGLOBAL (\S+)", str(error))
        raise ModelError(
            "pretrained weights: the pickle holds more than tensors, and loading it could run any code",
            value=str(path),
            rule=f"it names {named[1]}" if named else str(error).split(". ")[0].splitlines()[0],
            fix="open it where that does no harm, and save its tensors as .safetensors",
        ) from None
    except Exception as error:  # a damaged or hostile pickle makes torch's parser raise anything
        raise _unreadable(path, error) from error
    if not isinstance(content, Mapping):
        raise _unreadable(path, TypeError(f"it holds a {type(content).__name__}, no dict of tensors"))
    if not can_map:
        _LOG.warning("%s is a pickle of before torch 1.6: every rank reads it whole; save it again to avoid that", path)
    return content


def fit_weights(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], config: BranchConfig, where: str
) -> Weights:
    """Weights of a backbone by our names, resized to a branch.

    Args:
        weights: By the names of their release.
        wanted: The branch's state dict, for its names and shapes.
        config: The branch.
        where: Name of the file, for messages.

    Raises:
        ModelError: Keys are missing, unexpected or of another shape; how many of each is said, and the first of them.
    """
    found = foundation_names(weights, config)
    left: dict[str, Value] = _common_names(weights, config) if found is None else found
    kinds = ("missing", "unexpected", "of another shape", "not of floats")
    misfits: dict[str, dict[str, str]] = {kind: {} for kind in kinds}
    fitted: dict[str, Value] = {}
    for name, parameter in wanted.items():
        key = name if found is not None else official_branch_name(name, config, official_kind(config))
        value = left.pop(key, None)
        if value is None:
            if not _may_be_absent(name, config):
                misfits["missing"][key] = key
            continue
        if kind := not_floats(value):
            misfits["not of floats"][key] = f"{key} {kind}"
            continue
        tensor = _resize(name, value, config) if isinstance(value, Tensor) else value
        if tensor.shape.numel() != parameter.numel():
            misfits["of another shape"][key] = f"{key} {list(tensor.shape)} for {list(parameter.shape)}"
        elif isinstance(tensor, Tensor):
            tensor = tensor.reshape(parameter.shape)
        fitted[name] = tensor
    misfits["unexpected"] = {key: key for key in left if not _NOT_OF_A_BRANCH.search(key)}
    if any(misfits.values()):
        raise _misfit(misfits, config, where)
    return Weights(fitted)


def _misfit(misfits: Mapping[str, Mapping[str, str]], config: BranchConfig, where: str) -> ModelError:
    fixes = []
    if config.released_as:
        fixes.append("name the file of that model, or take the preset of this file's")
    if any(key.endswith(KEY_BIAS) for key in misfits["unexpected"]):
        fixes.append("key_bias=True on the branch has a bias for keys")
    if misfits["not of floats"]:
        fixes.append("name the file that was not quantised")
    return ModelError(
        f"pretrained weights {where} do not fit their branch: {describe_misfits(misfits)}",
        rule=f"its numbers are those of {config.released_as}" if config.released_as else "",
        fix="; ".join(fixes),
    )


def _may_be_absent(name: str, config: BranchConfig) -> bool:
    if config.released_as is not None and config.layer_scale_init != 1 and _LAYER_SCALE.search(name):
        # Its pretraining had them: without, the file is another model's, and fresh ones would shrink what that learnt.
        return False
    return _MAY_BE_ABSENT.search(name) is not None


def _common_names(weights: Mapping[str, Tensor], config: BranchConfig) -> dict[str, Value]:
    renamed: dict[str, Value] = {_CONVNEXT.sub("convnext_model.", name): value for name, value in weights.items()}
    if _SHARED_TABLE in renamed:
        # One table for all blocks in pretraining; each block's own from here on.
        for block in range(depth_of(config.sections)):
            renamed[f"blocks.{block}.attn.relative_position_bias_table"] = renamed[_SHARED_TABLE]
    return renamed


def _resize(name: str, tensor: Tensor, config: BranchConfig) -> Tensor:
    if isinstance(config, ConvNextBranchConfig):
        return tensor
    if name == "embedding.position":
        return _fit_position(tensor, config)
    if name == "embedding.proj.weight" and tensor.shape[-1] != config.patch_size_px:
        size = (config.patch_size_px, config.patch_size_px)
        return functional.interpolate(at_least_float32(tensor), size=size, mode="bicubic", align_corners=False)
    if name.endswith(".position_bias.table"):
        block = int(name.split(".")[1])
        return resize_position_table(tensor, config.window_size_tokens[block])
    return tensor


def _fit_position(position: Tensor, config: VitBranchConfig) -> Tensor:
    """Positions on the branch's own grid, with a class token's slot where the branch has one."""
    position_1NC = position.reshape(1, -1, position.shape[-1])
    num_slots = position_1NC.shape[1] - int(position_1NC.shape[1] ** 0.5) ** 2
    side = config.pretrain_resolution_px // config.patch_size_px
    grid_1NC = position_1NC[:, num_slots:]
    if grid_1NC.shape[1] != side**2:
        own_side = round(grid_1NC.shape[1] ** 0.5)
        grid_1NC = resize_position(at_least_float32(grid_1NC), own_side, side, side).flatten(1, 2)
    slot = position_1NC[:, :1] if num_slots else torch.zeros_like(grid_1NC[:, :1])
    return torch.cat((slot, grid_1NC), 1) if config.position_class_slot else grid_1NC


def _read_jax(path: Path, config: BranchConfig) -> dict[str, Tensor]:
    """AugReg's own NumPy files, by timm's conversion."""
    import numpy as np
    from timm.models.vision_transformer import VisionTransformer

    if not path.is_file():
        raise _absent(path)
    if not isinstance(config, VitBranchConfig):
        raise ModelError("pretrained weights: .npz is for vision transformers", value=str(path))
    try:
        with np.load(path) as arrays:
            tokens = arrays["Transformer/posembed_input/pos_embedding"].shape[1] - 1
            blocks = {name.split("/")[1] for name in arrays.files if _JAX_BLOCK in name}
        if len(blocks) != config.depth:
            # timm would take the first of them.
            raise ValueError(f"it has {len(blocks)} blocks for {config.depth}")
        model = VisionTransformer(
            img_size=round(tokens**0.5) * config.patch_size_px,
            patch_size=config.patch_size_px,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            num_classes=0,
        )
        model.load_pretrained(str(path))
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
        raise ModelError(
            "pretrained weights: no AugReg file of this branch's width and depth",
            value=str(path),
            rule=(str(error) or type(error).__name__).splitlines()[0],
            fix="name the .npz of the preset",
        ) from error
    return dict(model.state_dict())


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # Views of the mapped file (seen with safetensors 0.8.0): elements are read when somebody looks at them.
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, MemoryError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: BaseException) -> ModelError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    start = _start_of(path)
    if start and start.isascii() and start.decode().isprintable():
        reason += f"; it begins with {start.decode()!r}"
    fix = LACKS_MEMORY_FIX if lacks_memory(error) else name_it_deserves(path) or "download it again"
    return ModelError("pretrained weights cannot be read", value=str(path), rule=reason, fix=fix)


def _start_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.readline(_START_BYTES).rstrip(b"\n")
    except OSError:  # whoever reads the file says why
        return b""


def indexed_files(path: Path) -> list[str]:
    """The files that an index names, which lie beside it and are no indexes."""
    try:
        shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            "pretrained weights: the index cannot be read", value=str(path), rule=f"{type(error).__name__}: {error}"
        ) from None
    wrong = [shard for shard in shards if not (isinstance(shard, str) and _SHARD_FILE.fullmatch(shard))]
    if wrong or not shards:
        raise ModelError(
            f"pretrained weights: the index {path} names {wrong[0]!r}" if wrong else f"the index {path} names nothing",
            rule="an index names .safetensors or .bin files beside it",
        )
    return sorted(shards)


def _absent(path: Path, released_as: str | None = None) -> ModelError:
    folder = path.parent if path.suffix else path
    fix = f"correct the path, or download it{_command(folder, released_as)}"
    return ModelError("pretrained weights: no such file", value=str(path), fix=fix)


def _command(folder: Path, released_as: str | None) -> str:
    return "" if released_as is None else f": hf download {released_as} --local-dir {folder}"


def weights_in(folder: Path, released_as: str | None = None) -> Path:
    """The file of weights, or the index of several, in a folder.

    Args:
        folder: Where they are.
        released_as: Where the hub has them, for the message.

    Raises:
        ModelError: There is none, or more than one.
    """
    for pattern in ("*.safetensors.index.json", "*.bin.index.json", "*.safetensors", "*.bin", "*.pth", "*.pt"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
    raise ModelError(
        "pretrained weights: no single file or index in the folder",
        value=str(folder),
        rule="it must hold one *.index.json, *.safetensors, *.bin, *.pth or *.pt",
        fix=f"name the file, or download it{_command(folder, released_as)}",
    )
