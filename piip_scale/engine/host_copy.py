"""A copy in host memory of what a checkpoint is to hold, so that training can go on while it is written."""

from __future__ import annotations

import io
import pickle
from typing import Any, BinaryIO

import torch
from torch import Tensor

from piip_scale.errors import CheckpointError


class HostCopies:
    """Copies anything that ``torch.save`` could write; its memory is kept for the next time, page-locked for a GPU.

    Tensors that share memory share it in the copy, as they would in a file. One set of copies is alive at a time:
    ``start`` reuses the memory of those before.
    """

    def __init__(self) -> None:
        self._buffers: list[HostMemory] = []
        self._used = 0

    def start(self) -> None:
        """Frees the copies made before for those to come."""
        self._used = 0

    def copy(self, value: object) -> Any:
        """The value as it is now: tensors in host memory, all else as pickle copies it."""
        frozen, tensors = io.BytesIO(), _Tensors()
        _Freezer(frozen, tensors).dump(value)
        copies = self._copy_tensors(tensors.found)
        frozen.seek(0)
        return _Thawer(frozen, copies).load()

    def _copy_tensors(self, tensors: list[Tensor]) -> list[Tensor]:
        hosts: dict[int, torch.UntypedStorage] = {}
        copies = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            host = hosts.get(storage._cdata)
            if host is None:
                host = hosts[storage._cdata] = self._copy_storage(storage)
            geometry = tensor.storage_offset(), tensor.shape, tensor.stride()
            copies.append(torch.empty(0, dtype=tensor.dtype).set_(host, *geometry))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _copy_storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        if self._used == len(self._buffers):
            self._buffers.append(HostMemory(0))
        if self._buffers[self._used].data.numel() != source.numel():
            self._buffers[self._used].free()
            self._buffers[self._used] = HostMemory(source.numel())
        buffer = self._buffers[self._used].data.copy_(source, non_blocking=True)
        self._used += 1
        return buffer.untyped_storage()


class HostMemory:
    """Memory of the host, page-locked where there is a GPU, and not a byte more than asked for.

    torch's own page-locked memory is rounded up to a power of two, which can be twice as much: of a model that fills a
    GPU, more than its host has.

    Args:
        num_bytes: Its size.

    Attributes:
        data: The memory, uint8 (num_bytes,).

    Raises:
        CheckpointError: The system does not lock so much.
    """

    def __init__(self, num_bytes: int) -> None:
        self.data = torch.empty(num_bytes, dtype=torch.uint8)
        self._is_locked = torch.cuda.is_available() and num_bytes > 0
        if self._is_locked:
            result = torch.cuda.cudart().cudaHostRegister(self.data.data_ptr(), num_bytes, 0)
            if int(result) != 0:
                raise CheckpointError(
                    "memory for the copy of a checkpoint cannot be page-locked",
                    value=f"{num_bytes:,} bytes, CUDA error {int(result)}",
                    fix="set train.background_saves=False, which needs no copy",
                )

    def free(self) -> None:
        """Gives the lock back; to be called before the memory goes."""
        if self._is_locked:
            torch.cuda.cudart().cudaHostUnregister(self.data.data_ptr())
            self._is_locked = False


class _Tensors:
    """The tensors met on the way, each once."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self._indexes: dict[int, int] = {}

    def index_of(self, tensor: Tensor) -> int:
        index = self._indexes.setdefault(id(tensor), len(self.found))
        if index == len(self.found):
            self.found.append(tensor)
        return index


class _Freezer(pickle.Pickler):
    def __init__(self, file: BinaryIO, tensors: _Tensors) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def persistent_id(self, value: object) -> int | None:
        return self._tensors.index_of(value) if isinstance(value, Tensor) else None


class _Thawer(pickle.Unpickler):
    def __init__(self, file: BinaryIO, copies: list[Tensor]) -> None:
        super().__init__(file)
        self._copies = copies

    def persistent_load(self, index: int) -> Tensor:
        return self._copies[index]
