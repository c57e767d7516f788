"""A copy in host memory of what a checkpoint is to hold, so that training can go on while it is written."""

from __future__ import annotations

import io
import pickle
from typing import Any, BinaryIO

import torch
from torch import Tensor


class HostCopies:
    """Copies anything that ``torch.save`` could write; its memory is kept for the next time, page-locked for a GPU.

    Tensors that share memory share it in the copy, as they would in a file. One set of copies is alive at a time:
    ``start`` reuses the memory of those before.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
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
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[self._used].numel() != source.numel():
            pinned = torch.cuda.is_available()
            self._buffers[self._used] = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=pinned)
        buffer = self._buffers[self._used].copy_(source, non_blocking=True)
        self._used += 1
        return buffer.untyped_storage()


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
