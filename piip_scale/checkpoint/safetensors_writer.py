"""Writes safetensors files tensor by tensor, so that memory holds one tensor and not the model.

Source: the format as documented with safetensors: eight bytes of little-endian header length, a JSON header padded
with spaces, the tensors' bytes end to end. The library's own ``save_file`` wants all tensors in memory at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def in_file_order(entries: Iterable[Entry]) -> list[Entry]:
    """Wide dtypes first, so that every tensor starts at a multiple of its element size and can be mapped."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


class SafetensorsWriter:
    """A file under way: a context manager that takes its tensors one after the other.

    Leaving it normally puts the file on the disk; leaving it by an error removes it.

    Args:
        path: The file to write, replaced where present.
        entries: All tensors to come, in the order of ``in_file_order``.
        metadata: Texts for the header.

    Raises:
        OSError: The disk refuses; so do all methods.
    """

    def __init__(self, path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> None:
        self._path, self._left = path, list(entries)[::-1]
        self._file = path.open("wb")
        try:
            self._file.write(_header(self._left[::-1], metadata))
        except OSError:
            self._discard()
            raise

    def add(self, tensor: Tensor) -> None:
        """Writes the next tensor, which has the shape and dtype of its entry."""
        entry = self._left.pop()
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), entry
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        assert not self._left, f"{len(self._left)} tensors were not written"
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError:
            self._discard()
            raise

    def _discard(self) -> None:
        self._path.unlink(missing_ok=True)
        try:
            self._file.close()
        except OSError:
            # Closing flushes what a full disk just refused; the file is gone already.
            return


def _header(entries: list[Entry], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        content[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
