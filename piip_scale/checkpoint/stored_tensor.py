"""A tensor inside a file: where its elements are, not the elements."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from piip_scale.checkpoint.dtypes import DType


@dataclass(eq=False)
class Storage:
    """Bytes in a file that one or several tensors share; two are equal only where they are the same.

    Attributes:
        path: The file.
        num_bytes: Its size.
        place: Where in the file it begins, or where a header of a zip file's record begins that it follows.
        has_header: It follows one.
        crc32: Of all its bytes, as whoever wrote them left it; ``None`` where nobody did.
        data: All its bytes where they are in memory; nothing is read of the file then.
    """

    path: Path
    num_bytes: int
    place: int = 0
    has_header: bool = False
    crc32: int | None = None
    data: memoryview | None = None

    @cached_property
    def start(self) -> int:
        """Its first byte in the file; the file is opened for it once.

        Raises:
            OSError: It cannot be read.
        """
        return _behind_header(self.path, self.place) if self.has_header else self.place


@dataclass(frozen=True)
class Read:
    """Bytes of a storage that were read, and their CRC-32."""

    storage: Storage
    first: int
    num_bytes: int
    crc32: int


# Of a zip file's local header: its fixed part, and where in it the lengths of its name and extra field stand.
_HEADER_BYTES = 30
_NAME_LENGTH, _EXTRA_LENGTH = slice(26, 28), slice(28, 30)


def _behind_header(path: Path, header_start: int) -> int:
    """Where a zip record's content begins: only its own header, not the directory, says how long that header is."""
    with path.open("rb", buffering=0) as file:
        file.seek(header_start)
        header = file.read(_HEADER_BYTES)
    lengths = (int.from_bytes(header[part], "little") for part in (_NAME_LENGTH, _EXTRA_LENGTH))
    return header_start + _HEADER_BYTES + sum(lengths)


@dataclass(frozen=True)
class StoredTensor:
    """Elements of a storage.

    Two are equal where they are the same elements of the same storage: a tensor under two names.

    Attributes:
        storage: Holds them.
        dtype: Of each.
        offset: The first one's place in the storage, in elements.
        shape: Of the tensor.
        strides: From one to the next in each dimension, in elements.
    """

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements, those that are one in the storage counted each."""
        return self.numel * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Elements of the storage from its first to its last, both counted."""
        if not self.numel:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements follow each other in the storage as they do in the flattened tensor."""
        wanted = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != wanted:
                return not self.numel
            wanted *= size
        return True

    def fits(self) -> bool:
        """Whether the storage holds all its elements."""
        counts = (self.offset, *self.shape, *self.strides)
        is_plain = len(self.shape) == len(self.strides) and all(type(count) is int and count >= 0 for count in counts)
        return is_plain and (self.offset + self.span) * self.dtype.itemsize <= self.storage.num_bytes
