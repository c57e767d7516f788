"""Weights on their way into a model: from safetensors, or straight from a run's sharded checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from piip_scale.checkpoint.left_out import Given
from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.errors import ModelError
from piip_scale.files import LACKS_MEMORY_FIX, lacks_memory
from piip_scale.models.stored import SCALE, WEIGHT, StoredWeights

_NUM_NAMED = 3
# Pages of a mapped file count as this process's memory until it is unmapped, however short their use.
_MAPPED_BYTES = 1 << 30
_CPU = torch.device("cpu")


class WeightSource(Protocol):
    """A model's tensors somewhere on a disk, each read when asked for.

    Attributes:
        name: What messages call them.
        shapes: Of every tensor, by the model's names.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str, dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
        """A tensor on a device; on the CPU, one that has this dtype already may be mapped from the disk.

        Raises:
            PiipError: It cannot be read.
        """
        ...


class SafetensorsWeights:
    """A ``.safetensors`` file, or a folder of them: a ``WeightSource``.

    Tensors of the dtype asked for are the file's own pages, read when used and shared by all processes that use them:
    a model of six billion parameters is in memory once, and the system may drop what it can read again.

    Args:
        path: The file or folder.

    Raises:
        ModelError: It is absent or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._files: dict[Path, Any] = {file: None for file in _files(path)}
        self._bytes_read = 0
        self._file_of: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in self._files:
            opened = self._opened(file)
            names = list(opened.keys())
            self._file_of |= dict.fromkeys(names, file)
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def read(self, name: str, dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
        """As in ``WeightSource``."""
        try:
            stored: Tensor = self._opened(self._file_of[name]).get_tensor(name)
            if stored.dtype == dtype and device == _CPU:
                return stored
            converted = stored.to(device, dtype)
        except (MemoryError, RuntimeError) as error:
            raise _unreadable(self.name, error) from None
        self._count(stored.numel() * stored.element_size())
        return converted

    def _count(self, num_bytes: int) -> None:
        self._bytes_read += num_bytes
        if self._bytes_read > _MAPPED_BYTES:
            self._files, self._bytes_read = dict.fromkeys(self._files), 0

    def _opened(self, file: Path) -> Any:
        if self._files[file] is None:
            self._files[file] = _open(file, self.name)
        return self._files[file]


class StoredInModel:
    """Weights for a model that stores some of them in 8 bits, from a source that may hold floats: a ``WeightSource``.

    Args:
        model: The model, on any device.
        source: The weights.
    """

    def __init__(self, model: nn.Module, source: WeightSource) -> None:
        self.name, self._source = source.name, source
        self._stored = StoredWeights(model, _Read(source))
        made = {name: tuple(model.get_parameter(name).shape) for name in self._stored if name not in source.shapes}
        self._made = {*made, *(name.removesuffix(SCALE) + WEIGHT for name in made)}
        self.shapes: Mapping[str, tuple[int, ...]] = {**source.shapes, **made}

    def read(self, name: str, dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
        """As in ``WeightSource``."""
        if name in self._made:
            return self._stored[name].to(device, dtype)
        return self._source.read(name, dtype, device)


class _Read(Mapping[str, Tensor]):
    """A source's tensors as they are, in float32 where they are floats."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def __getitem__(self, name: str) -> Tensor:
        return self._source.read(name, torch.float32)

    def __contains__(self, name: object) -> bool:
        return name in self._source.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.shapes)

    def __len__(self) -> int:
        return len(self._source.shapes)


class CheckpointWeights:
    """The weights in a sharded checkpoint, without converting it: a ``WeightSource``.

    Args:
        folder: The checkpoint.
        averaged: Trained parameters are their running averages.
        given: Reads frozen weights that the checkpoint leaves to other files.

    Raises:
        CheckpointError: Its files are damaged, or hold no averages.
    """

    def __init__(self, folder: Path, *, averaged: bool = False, given: Given | None = None) -> None:
        self.name = f"{folder}{' (averages)' if averaged else ''}"
        self._checkpoint = ZeroCheckpoint(folder, averaged=averaged, given=given)
        weights = self._checkpoint.weights
        self.shapes: Mapping[str, tuple[int, ...]] = {name: weight.shape for name, weight in weights.items()}

    def read(self, name: str, dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
        """As in ``WeightSource``."""
        weight = self._checkpoint.weights[name]
        read_as = dtype if weight.dtype.is_floating_point else weight.dtype.to_torch()
        flat = torch.empty(weight.numel, dtype=read_as, device=device)
        self._checkpoint.copy_slice(name, 0, flat)
        return flat.view(weight.shape)


@torch.no_grad()
def load_weights(model: nn.Module, source: WeightSource, devices: Mapping[str, torch.device] | None = None) -> None:
    """Gives a model its weights, one tensor at a time; dtypes stay.

    Args:
        model: The model; parameters it uses under several names need one of them. Those on the meta device become the
            tensors that are read; others are copied into, where they are.
        source: The weights.
        devices: Where those go that are read, by the model's names; the CPU for others.

    Raises:
        ModelError: Names or shapes are not the model's; nothing is changed then.
        PiipError: A tensor cannot be read.
    """
    state = model.state_dict(keep_vars=True)
    check_weights(state, source)
    made: dict[int, Tensor] = {}
    devices = devices or {}
    for name in source.shapes:
        place = state[name]
        if not place.is_meta:
            place.copy_(source.read(name, place.dtype))
        elif id(place) not in made:
            made[id(place)] = source.read(name, place.dtype, devices.get(name, _CPU))
    _put(model, made)


def _put(model: nn.Module, made: Mapping[int, Tensor]) -> None:
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in made:
                module.register_parameter(key, nn.Parameter(made[id(parameter)], parameter.requires_grad))
        for key, buffer in list(module.named_buffers(recurse=False)):
            if id(buffer) in made:
                module.register_buffer(key, made[id(buffer)])


def _open(file: Path, name: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, MemoryError) as error:
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: BaseException) -> ModelError:
    fix = LACKS_MEMORY_FIX if lacks_memory(error) else "convert the checkpoint again"
    return ModelError(f"weights {name} cannot be read", value=str(error), fix=fix)


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ModelError(
            "weights not found",
            value=str(path),
            rule="a .safetensors file, a folder of them, or a checkpoint of a run",
            fix="`piip-scale convert RUN OUT.safetensors` makes it from a checkpoint",
        )
    return files


def check_weights(state: Mapping[str, Tensor], source: WeightSource) -> None:
    """Holds names and shapes to a model's, whose state is given with its parameters (``keep_vars``).

    Raises:
        ModelError: Some are missing, of another shape, or none of the model's.
    """
    shapes = source.shapes
    present = {id(state[name]) for name in shapes if name in state}
    missing = [name for name, tensor in state.items() if id(tensor) not in present]
    unexpected = [name for name in shapes if name not in state]
    misshaped = [
        f"{name} {list(shape)} for {list(state[name].shape)}"
        for name, shape in shapes.items()
        if name in state and tuple(shape) != tuple(state[name].shape)
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in problems.items() if names)
        raise ModelError(
            f"weights {source.name} are not this config's model: {listed}",
            fix="use the config of the run they come from",
        )


def _some(names: Sequence[str] | Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NUM_NAMED]) + (", ..." if len(names) > _NUM_NAMED else "")
