"""Writing files so that each is whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from piip_scale.errors import DataError
from piip_scale.files import atomic_file, disk_errors


@contextlib.contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file that takes its name only once it is complete.

    Args:
        path: Its final name; missing folders are made.
        durable: Also wait until it is on disk, so that it survives a loss of power.

    Raises:
        DataError: The disk is full, or the folder cannot be written.
    """
    with disk_errors(DataError, f"write {path}"), atomic_file(path, durable=durable) as file:
        yield file


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Writes a whole file or none.

    Raises:
        DataError: The disk is full, or the folder cannot be written.
    """
    with whole_file(path, durable=durable) as file:
        file.write(content)


def json_bytes(value: Any) -> bytes:
    """JSON with the same bytes for the same value."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def sha256_of(content: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file, read block by block."""
    with open(path, "rb") as file:
        return sha256_of_open(file)


def sha256_of_open(file: BinaryIO, block_bytes: int = 1 << 20) -> str:
    """The SHA-256 of a whole open file, read block by block."""
    digest = hashlib.sha256()
    file.seek(0)
    for block in iter(lambda: file.read(block_bytes), b""):
        digest.update(block)
    return digest.hexdigest()


def read_whole(path: Path) -> bytes:
    """The content of a file of a packed set.

    Raises:
        DataError: It is absent or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read", value=os.strerror(error.errno or 0), fix="pack the set again"
        ) from None


class HashingWriter:
    """A file object that counts and hashes what passes through it, for ``tarfile``."""

    def __init__(self, file: BinaryIO) -> None:
        self._write: Callable[[bytes], int] = file.write
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, content: bytes) -> int:
        """Writes, counts and hashes."""
        self._digest.update(content)
        self.num_bytes += len(content)
        return self._write(content)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.num_bytes

    @property
    def sha256(self) -> str:
        """The SHA-256 of everything written so far, in hexadecimal."""
        return self._digest.hexdigest()
