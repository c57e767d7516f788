"""Frozen weights that a checkpoint leaves out: which a file of pretrained weights holds, and back from that file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piip_scale.config.model import PiipConfig
from piip_scale.errors import ModelError
from piip_scale.files import checksum_of, disk_errors
from piip_scale.models.pretrained import indexed_files, pretrained_weights, weights_in
from piip_scale.models.released import from_released, is_released
from piip_scale.models.stored import StoredWeights
from piip_scale.models.trunk import Trunk
from piip_scale.models.whole_file import read_whole_file

_NETWORK = "branches."
NAMES, FILES = "names", "files"
"""Keys of a record: what was left out, and each file by the config's key that names it."""


def describe_left_out(config: PiipConfig, frozen: Collection[str]) -> dict[str, Any]:
    """What a checkpoint may leave out, as JSON: what is frozen and starts from a file. Reads these files whole.

    Args:
        config: The network.
        frozen: The model's names of parameters that are not trained.

    Raises:
        ModelError: A file cannot be read, or holds nothing that is frozen.
    """
    given = frozen_weights(config, frozen)
    if not given:
        raise ModelError(
            "train.save_frozen=False has nothing to leave out",
            value=f"{len(frozen)} frozen parameters",
            rule="it leaves out what is frozen and starts from a file of pretrained weights",
            fix="freeze a branch with pretrained weights, or leave save_frozen out",
        )
    return {NAMES: list(given), FILES: {key: _describe(path) for key, path in _named_files(config).items()}}


def frozen_weights(config: PiipConfig, frozen: Collection[str]) -> Mapping[str, Tensor]:
    """What files of pretrained weights give of a model's frozen parameters, mapped into memory where possible.

    Args:
        config: The network, with the files' paths.
        frozen: The model's names of them.

    Raises:
        ModelError: A file is absent, cannot be read, or does not fit the network.
    """
    with torch.device("meta"):
        trunk = Trunk(config)
    ours = {name[name.index(_NETWORK) :]: name for name in frozen if _NETWORK in name}
    found = pretrained_weights(trunk) if config.pretrained is None else _of_whole_file(trunk, ours)
    held = StoredWeights(trunk, found)
    return _Renamed(held, {ours[name]: name for name in held if name in ours})


class _Renamed(Mapping[str, Tensor]):
    """Tensors by other names, each made when asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def reader_of(config: PiipConfig) -> Callable[[Mapping[str, Any]], Mapping[str, Tensor]]:
    """Reads what checkpoints left out from the files that a config names now, once they are known to be the same.

    Args:
        config: The network of the checkpoint; its files may have moved.
    """

    def read(record: Mapping[str, Any]) -> Mapping[str, Tensor]:
        for key, saved in record[FILES].items():
            _require_same(key, _named_files(config).get(key), saved)
        found = frozen_weights(config, record[NAMES])
        missing = [name for name in record[NAMES] if name not in found]
        if missing:
            raise ModelError(
                f"frozen weights that a checkpoint left out: {missing[0]} is in no file",
                rule="the config must be of the network that was trained",
            )
        return found

    return read


def moved(config: PiipConfig, record: Mapping[str, Any], places: Sequence[Path]) -> PiipConfig:
    """The config with its files of pretrained weights where they are now.

    Args:
        config: The network of a checkpoint.
        record: The checkpoint's.
        places: Files, in any order, told apart by their checksums.

    Raises:
        ModelError: One is absent, or is none of those that the checkpoint was trained from.
    """
    values = config.model_dump()
    for path in places:
        described = _describe(path)
        keys = [key for key, saved in record[FILES].items() if _same(saved, described)]
        if not keys:
            raise _other(path, described, " or ".join(map(str, map(_in_words, record[FILES].values()))))
        for key in keys:
            *branch, _ = key.split(".")
            (values["branches"][int(branch[1])] if branch else values)["pretrained"] = str(path)
    return PiipConfig.model_validate(values)


def _named_files(config: PiipConfig) -> dict[str, Path]:
    if config.pretrained is not None:
        return {"pretrained": Path(config.pretrained)}
    named = enumerate(branch.pretrained for branch in config.branches)
    return {f"branches.{index}.pretrained": Path(path) for index, path in named if path is not None}


def _of_whole_file(trunk: Trunk, ours: Mapping[str, str]) -> dict[str, Tensor]:
    wanted = {ours.get(name, name): tensor for name, tensor in trunk.state_dict().items() if name in ours}
    tensors = read_whole_file(Path(str(trunk.config.pretrained))).tensors
    if is_released(tensors, wanted, trunk.config):
        tensors = from_released(tensors, wanted, trunk.config)
    return {name[name.index(_NETWORK) :]: tensor for name, tensor in tensors.items() if _NETWORK in name}


def _describe(path: Path) -> dict[str, Any]:
    if path.is_dir():
        path = weights_in(path)
    files = [path.parent / name for name in indexed_files(path)] if path.suffix == ".json" else [path]
    with disk_errors(ModelError, f"read pretrained weights {path}"):
        num_bytes, crc = checksum_of(files)
    return {"path": str(path), "bytes": num_bytes, "crc32": f"{crc:08x}"}


def _require_same(key: str, path: Path | None, saved: Mapping[str, Any]) -> None:
    if path is None or not path.exists():
        raise ModelError(
            f"frozen weights that a checkpoint left out: model.{key} is not there",
            value=str(path),
            rule=f"they are in {_in_words(saved)}",
            fix=f"put it back, or say where it is: --set model.{key}=PATH (convert: --pretrained PATH)",
        )
    found = _describe(path)
    if not _same(saved, found):
        raise _other(path, found, _in_words(saved))


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("bytes", "crc32"))


def _in_words(saved: Mapping[str, Any]) -> str:
    return f"{saved['path']} of {saved['bytes']} bytes with CRC-32 {saved['crc32']}"


def _other(path: Path, found: Mapping[str, Any], wanted: str) -> ModelError:
    return ModelError(
        f"pretrained weights {path} are not those that the checkpoint left its frozen weights to",
        value=f"{found['bytes']} bytes with CRC-32 {found['crc32']}",
        rule=f"it was trained with {wanted}",
        fix="give it that file",
    )
