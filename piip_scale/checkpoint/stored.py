"""Pickles of tensors, mapped and read without running their code; and slices of tensors inside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piip_scale.checkpoint.slices import Slice, whole
from piip_scale.checkpoint.swapped import SWAPPED, attach_swapped
from piip_scale.errors import CheckpointError
from piip_scale.files import LACKS_MEMORY_FIX, lacks_memory

# A mapped file's pages count as this process's memory until it is unmapped: so much for all files together, but at
# least so much for each.
_MAPPED_BYTES = 64 << 20
_MAPPED_BYTES_PER_FILE = 16 << 20


class _Inert:
    """Stands for DeepSpeed's own objects in its pickles, of which no weight depends."""


class Fragment:
    """Stands for DeepSpeed's ``fragment_address``: where a rank's flat tensor holds its part of a parameter.

    Attributes:
        start: First element in the flat tensor.
        numel: Elements.
    """

    start: int
    numel: int


_STAND_INS = [
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


class StoredFile:
    """One pickle, mapped into memory; unmapped, and mapped again, whenever its share of bytes was read.

    Args:
        path: The file.
        num_files: Files that are read beside each other, itself counted; they share what may be mapped.
    """

    def __init__(self, path: Path, num_files: int = 1) -> None:
        self.path = path
        self._max_mapped_bytes = max(_MAPPED_BYTES // max(num_files, 1), _MAPPED_BYTES_PER_FILE)
        self._content: Any = None
        self._has_swapped = False
        self._bytes_read = 0

    def get(self, *keys: str | int) -> Any:
        """What lies under ``keys``.

        Raises:
            CheckpointError: Nothing does, or the file cannot be read.
        """
        if self._content is None:
            self._content = _load(self.path)
            # Raw files beside it, checked where they are mapped, hold what this file has no room for.
            self._has_swapped = isinstance(self._content, dict) and SWAPPED in self._content
        value = self._content
        for key in keys:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                raise CheckpointError(
                    f"{self.path} has no entry {'.'.join(map(str, keys))}",
                    rule="this version reads the files of DeepSpeed 0.19",
                ) from None
        return value

    def tensor(self, *keys: str | int) -> Tensor:
        """The tensor under ``keys``, mapped.

        Raises:
            CheckpointError: There is none, or it claims more elements than the file has room for.
        """
        value: Tensor = self.get(*keys)
        is_plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not is_plain or (not self._has_swapped and _num_bytes(value) > self.path.stat().st_size):
            raise CheckpointError(
                f"{self.path}: {'.'.join(map(str, keys))} is no tensor that the file holds",
                value=tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__,
                fix="take another checkpoint",
            )
        return value

    def copy_into(self, out: Tensor, part: Slice, *keys: str | int, dtype: torch.dtype | None = None) -> None:
        """Copies a slice of the tensor under ``keys``, of numbers of the kind of ``dtype`` where one is given.

        ``out`` is 1-D, of the slice's length, on any device.
        """
        value = self.tensor(*keys)
        if dtype is not None and value.dtype.is_floating_point != dtype.is_floating_point:
            raise CheckpointError(
                f"{self.path}: {'.'.join(map(str, keys))} is of {value.dtype}", rule=f"{part.name} is of {dtype}"
            )
        if part.start + part.length > value.numel():
            # Else one element would silently spread over many.
            raise CheckpointError(
                f"{self.path}: {'.'.join(map(str, keys))} has {value.numel()} elements, of which {part.name} would be "
                f"{part.start} to {part.start + part.length}",
                fix="take another checkpoint",
            )
        out.copy_(part.of(value.reshape(-1)))
        self._bytes_read += out.numel() * out.element_size()
        if self._bytes_read > self._max_mapped_bytes:
            self._content, self._bytes_read = None, 0


@dataclass(frozen=True)
class StoredSlice:
    """A slice of a parameter in a file.

    Attributes:
        slice: Which elements, and where they are in the tensor under ``keys``.
        file: The file.
        keys: Where in it the tensor is that holds them.
        state_keys: Where in it the optimiser's state of that tensor is; empty for what is not trained.
    """

    slice: Slice
    file: StoredFile
    keys: tuple[str | int, ...]
    state_keys: tuple[str | int, ...] = ()

    def copy_into(self, out: Tensor, part: Slice, dtype: torch.dtype, state: str | None = None) -> None:
        """Copies a part of the slice, which is of a dtype, or of the optimiser's ``state`` of it, which may be of any.

        ``out`` is 1-D, of the part's length.
        """
        if state is None:
            self.file.copy_into(out, part, *self.keys, dtype=dtype)
        else:
            self.file.copy_into(out, part, *self.state_keys, state)


@dataclass(frozen=True)
class Weight:
    """A tensor of the model as the checkpoint holds it.

    Attributes:
        shape: Its shape in the model.
        dtype: Its stored dtype: float32 for parameters that are trained under ZeRO, else the model's own.
        is_buffer: A buffer, not a parameter.
        parts: Where its elements are, in order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_buffer: bool
    parts: tuple[StoredSlice, ...]

    @property
    def numel(self) -> int:
        """Its elements."""
        return sum(part.slice.length for part in self.parts)

    @property
    def is_trained(self) -> bool:
        """Whether the checkpoint has a place for the optimiser's state of it."""
        return any(part.state_keys for part in self.parts)

    def with_states(self, *keys: str | int, group: int) -> Weight:
        """The same, with where the optimiser's state is of each part, all in one tensor of their file."""
        return replace(
            self,
            parts=tuple(
                replace(part, slice=replace(part.slice, group=group), state_keys=(*keys, group)) for part in self.parts
            ),
        )


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def whole_weight(file: StoredFile, name: str, *keys: str | int, is_buffer: bool = False) -> Weight:
    """The whole tensor under ``keys`` of a file as a weight."""
    value = file.tensor(*keys)
    part = StoredSlice(whole(name, value.numel()), file, keys)
    return Weight(tuple(value.shape), value.dtype, is_buffer, (part,))


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(list(_STAND_INS)):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if not unsafe:
                content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                if isinstance(content, dict):
                    attach_swapped(content, path.parent)
                return content
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile pickle makes torch's parser raise anything
        if lacks_memory(error):
            raise CheckpointError(
                f"{path} cannot be mapped: no room for its {path.stat().st_size} bytes in this process's address space",
                rule="the file may well be whole",
                fix=LACKS_MEMORY_FIX,
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read: {reason}", fix="take another checkpoint") from error
    raise CheckpointError(
        f"{path} holds objects that could run code when read",
        value=sorted(unsafe),
        rule="only tensors, plain Python values and DeepSpeed's own records are read",
        fix="save such objects as plain values or tensors",
    )
