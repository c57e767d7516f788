"""Bytes of many files by place, with few of the files open at a time."""

from __future__ import annotations

import os
from collections import OrderedDict
from io import FileIO
from pathlib import Path

from piip_scale.checkpoint.stored_tensor import StoredTensor
from piip_scale.errors import CheckpointError
from piip_scale.files import disk_errors

# A checkpoint has two files a rank, and a process may often have a thousand open.
_MOST_OPEN = 64


class OpenFiles:
    """Files that are read by place; those asked for last stay open. For one thread."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, FileIO] = OrderedDict()

    def read_into(self, out: memoryview, path: Path, start: int) -> None:
        """Fills a buffer of bytes from the byte ``start`` of a file on.

        Raises:
            CheckpointError: The file ends before, or cannot be read.
        """
        with disk_errors(CheckpointError, f"read {path}"):
            file = self._opened(path)
            done = 0
            while done < len(out):
                count = os.preadv(file.fileno(), [out[done:]], start + done)
                if count == 0:
                    raise CheckpointError(
                        f"{path} ends at byte {start + done}",
                        rule=f"bytes to {start + len(out)} belong to a tensor",
                        fix="take another checkpoint",
                    )
                done += count

    def read_elements(self, out: memoryview, tensor: StoredTensor, element: int) -> None:
        """Fills a buffer with a tensor's bytes from an element on, as ``start_of`` counts them.

        Raises:
            CheckpointError: As of ``read_into``.
        """
        data = tensor.storage.data
        if data is None:
            self.read_into(out, tensor.storage.path, start_of(tensor, element))
        else:
            first = (tensor.offset + element) * tensor.dtype.itemsize
            out[:] = data[first : first + len(out)]

    def _opened(self, path: Path) -> FileIO:
        if path not in self._files:
            if len(self._files) >= _MOST_OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[path] = FileIO(os.fspath(path))
        self._files.move_to_end(path)
        return self._files[path]

    def close(self) -> None:
        """Closes all."""
        while self._files:
            self._files.popitem()[1].close()


def start_of(tensor: StoredTensor, element: int) -> int:
    """The byte in its file at which an element of a contiguous tensor begins, or of another the storage's element."""
    return tensor.storage.start + (tensor.offset + element) * tensor.dtype.itemsize
