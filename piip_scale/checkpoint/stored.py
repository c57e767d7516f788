"""Where a checkpoint's tensors are: files, slices of tensors inside them, and the weights these make up."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piip_scale.checkpoint.dtypes import DType
from piip_scale.checkpoint.slices import Slice, whole
from piip_scale.checkpoint.stored_tensor import StoredTensor
from piip_scale.checkpoint.swapped import SWAPPED, attach_swapped
from piip_scale.checkpoint.torch_file import read_torch_file
from piip_scale.errors import CheckpointError

if TYPE_CHECKING:
    from piip_scale.checkpoint.lora import Addition


class StoredFile:
    """One file of ``torch.save``, described when first asked; its tensors stay on the disk.

    Args:
        path: The file.
        allowed: Classes whose objects it may hold beside what is read, as ``argparse.Namespace``.
    """

    def __init__(self, path: Path, allowed: Collection[str] = ()) -> None:
        self.path = path
        self._allowed = allowed
        self._content: Any = None
        self._has_swapped, self._num_bytes = False, 0

    def get(self, *keys: str | int) -> Any:
        """What lies under ``keys``.

        Raises:
            CheckpointError: Nothing does, or the file cannot be read.
        """
        value = self._opened()
        for key in keys:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                raise CheckpointError(
                    f"{self.path} has no entry {'.'.join(map(str, keys))}",
                    rule="this version reads the files of DeepSpeed 0.8 to 0.19",
                ) from None
        return value

    def _opened(self) -> Any:
        if self._content is None:
            content = read_torch_file(self.path, self._allowed)
            # Once, and not for each of thousands of tensors: every rank that resumes may ask for them all.
            self._num_bytes = self.path.stat().st_size
            if isinstance(content, dict):
                # Raw files beside it, checked where they are found, hold what this file has no room for.
                self._has_swapped = SWAPPED in content
                self._attach(content)
            self._content = content
        return self._content

    def _attach(self, content: dict[Any, Any]) -> None:
        try:
            attach_swapped(content, self.path.parent)
        except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"{self.path} cannot be read: what it says of tensors on a disk", value=content[SWAPPED]
            ) from error

    def tensor(self, *keys: str | int) -> StoredTensor:
        """The tensor under ``keys``.

        Raises:
            CheckpointError: There is none, or it claims more elements than the file has room for.
        """
        value = self.get(*keys)
        if not isinstance(value, StoredTensor) or (not self._has_swapped and value.num_bytes > self._num_bytes):
            raise CheckpointError(
                f"{self.path}: {'.'.join(map(str, keys))} is no tensor that the file holds",
                value=value.shape if isinstance(value, StoredTensor) else type(value).__name__,
                fix="take another checkpoint",
            )
        return value


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

    def tensor(self, dtype: DType, state: str | None = None) -> StoredTensor:
        """The tensor that holds the slice, which is of a dtype; or the optimiser's ``state`` of it, of any.

        Raises:
            CheckpointError: There is none, or it does not hold all of the slice.
        """
        keys = self.keys if state is None else (*self.state_keys, state)
        value = self.file.tensor(*keys)
        if state is None and value.dtype.is_floating_point != dtype.is_floating_point:
            raise CheckpointError(
                f"{self.file.path}: {'.'.join(map(str, keys))} is of {value.dtype.name}",
                rule=f"{self.slice.name} is of {dtype.name}",
            )
        if self.slice.start + self.slice.length > value.numel:
            raise CheckpointError(
                f"{self.file.path}: {'.'.join(map(str, keys))} has {value.numel} elements, of which {self.slice.name} "
                f"would be {self.slice.start} to {self.slice.start + self.slice.length}",
                fix="take another checkpoint",
            )
        return value


@dataclass(frozen=True)
class Weight:
    """A tensor of the model as the checkpoint holds it.

    Attributes:
        shape: Its shape in the model.
        dtype: Its stored dtype: float32 for parameters that are trained under ZeRO, else the model's own.
        is_buffer: A buffer, not a parameter.
        parts: Where its elements are, in order.
        addition: What is added to them when they are copied.
    """

    shape: tuple[int, ...]
    dtype: DType
    is_buffer: bool
    parts: tuple[StoredSlice, ...]
    addition: Addition | None = None

    @property
    def numel(self) -> int:
        """Its elements."""
        return sum(part.slice.length for part in self.parts)

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
    value = file.tensor(*keys)
    part = StoredSlice(whole(name, value.numel), file, keys)
    return Weight(value.shape, value.dtype, is_buffer, (part,))
