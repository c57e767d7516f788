"""Pickles of tensors, mapped and read without running their code; and slices of tensors inside them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piip_scale.checkpoint.slices import Slice, whole
from piip_scale.checkpoint.swapped import attach_swapped
from piip_scale.errors import CheckpointError

# A mapped file's pages count as this process's memory until it is unmapped: so much for all files together, but at
# least so much for each.
_MAPPED_BYTES = 64 << 20
_MAPPED_BYTES_PER_FILE = 16 << 20


class _Inert:
    """Stands for DeepSpeed's own objects in its pickles, of which no weight depends."""


_STAND_INS = [
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
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
        self._bytes_read = 0

    def get(self, *keys: str | int) -> Any:
        """What lies under ``keys``.

        Raises:
            CheckpointError: Nothing does, or the file cannot be read.
        """
        if self._content is None:
            self._content = _load(self.path)
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

    def copy_into(self, out: Tensor, part: Slice, *keys: str | int) -> None:
        """Copies a slice of the tensor under ``keys``; ``out`` is 1-D, of the slice's length, on any device."""
        out.copy_(part.of(self.get(*keys).reshape(-1)))
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

    def copy_into(self, out: Tensor, part: Slice, state: str | None = None) -> None:
        """Copies a part of the slice, or of the optimiser's ``state`` of it; ``out`` is 1-D, of the part's length."""
        self.file.copy_into(out, part, *(self.keys if state is None else (*self.state_keys, state)))


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


def whole_weight(file: StoredFile, name: str, *keys: str | int, is_buffer: bool = False) -> Weight:
    """The whole tensor under ``keys`` of a file as a weight."""
    value = file.get(*keys)
    part = StoredSlice(whole(name, value.numel()), file, keys)
    return Weight(tuple(value.shape), value.dtype, is_buffer, (part,))


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(list(_STAND_INS)):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if not unsafe:
                content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                attach_swapped(content, path.parent)
                return content
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read: {reason}", fix="take another checkpoint") from error
    raise CheckpointError(
        f"{path} holds objects that could run code when read",
        value=sorted(unsafe),
        rule="only tensors, plain Python values and DeepSpeed's own records are read",
        fix="save such objects as plain values or tensors",
    )
