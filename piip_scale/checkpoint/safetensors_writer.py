"""Writes safetensors files in any order and from several threads, so that memory holds a part and not the model.

Source: the format as documented with safetensors: eight bytes of little-endian header length, a JSON header padded
with spaces, the tensors' bytes end to end. The library's own ``save_file`` wants all tensors in memory at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from piip_scale.checkpoint.dtypes import DType

_HEADER_ALIGNMENT = 8
# Smaller ones share pages and requests with their neighbours.
_LEAST_SENT_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_file_order(entries: Iterable[Entry]) -> list[Entry]:
    """Wide dtypes first, so that every tensor starts at a multiple of its element size and can be mapped."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


class SafetensorsWriter:
    """A file under way: a context manager that takes its tensors in any order, in parts, from any thread.

    Leaving it normally puts the file on the disk; leaving it by an error removes it. Its room on the disk is taken at
    once, so that a disk too small says so before anything is written.

    Args:
        path: The file to write, replaced where present.
        entries: All tensors to come, in the order of ``in_file_order``.
        metadata: Texts for the header.
        keep: What the file holds already stays, of a writer that was killed with the same entries and metadata.

    Attributes:
        path: The file.
        starts: The first byte in the file of each tensor, by name.

    Raises:
        OSError: The disk refuses; so do all methods.
    """

    def __init__(
        self, path: Path, entries: Iterable[Entry], metadata: Mapping[str, str], *, keep: bool = False
    ) -> None:
        entries = list(entries)
        header = _header(entries, metadata)
        self.path = path
        self.starts: dict[str, int] = {}
        self._sizes = {entry.name: entry.num_bytes for entry in entries}
        end = len(header)
        for entry in entries:
            self.starts[entry.name], end = end, end + entry.num_bytes
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | (0 if keep else os.O_TRUNC), 0o666)
        try:
            os.posix_fallocate(self._file, 0, end)
            self.write_at(0, memoryview(header))
        except OSError:
            self._discard()
            raise

    def write(self, name: str, first: int, data: memoryview) -> None:
        """Writes a part of a tensor, from its byte ``first`` on."""
        self.write_at(self.starts[name] + first, data)

    def send(self, name: str) -> None:
        """Has the disk begin with a tensor that is written, beside what is still to come; waits for nothing."""
        num_bytes = self._sizes[name]
        if num_bytes >= _LEAST_SENT_BYTES:
            # Pages that are not on the disk stay in memory all the same: the kernel only starts to write them.
            os.posix_fadvise(self._file, self.starts[name], num_bytes, os.POSIX_FADV_DONTNEED)

    def write_at(self, place: int, data: memoryview) -> None:
        """Writes bytes at a place of the file."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], place + done)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            os.fsync(self._file)
        except OSError:
            self._discard()
            raise
        os.close(self._file)

    def _discard(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._file)


def _header(entries: list[Entry], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        content[entry.name] = {"dtype": entry.dtype.code, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
