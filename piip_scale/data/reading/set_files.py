"""The files of a packed set: read in place from a folder, through the node's cache from anywhere else."""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from piip_scale.config.run import CacheConfig
from piip_scale.data.reading.cache import GIB, Entry, FileCache, cache_folder
from piip_scale.data.reading.fetching import Fetcher
from piip_scale.data.reading.files import read_whole, sha256_of, sha256_of_file, sha256_of_open
from piip_scale.data.reading.manifest import MANIFEST, SHARD_GLOB, ShardInfo
from piip_scale.data.reading.sources import NEVER, Stop, is_remote, open_source
from piip_scale.errors import DataError, FetchError

_MAX_OPEN_SHARDS = 128
_INDEXES_AT_ONCE = 16
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
Range = tuple[int, int]
"""Offset in a file, and length."""


class SetFiles(Protocol):
    """Where a set's files are read.

    Attributes:
        location: As the user wrote it.
        is_remote: Shards come to this node one by one, and may have to be waited for.
    """

    location: str
    is_remote: bool

    def manifest(self) -> bytes:
        """The manifest.

        Raises:
            DataError: It is not there, or cannot be read.
        """
        ...

    def indexes(self, shards: Sequence[ShardInfo]) -> list[bytes]:
        """The indexes of shards, which must be there themselves, and whole.

        Raises:
            DataError: One is not, or cannot be read.
        """
        ...

    def read(self, shard: ShardInfo, ranges: Sequence[Range]) -> list[bytes]:
        """Parts of a shard.

        Raises:
            DataError: The shard is gone or cut off.
        """
        ...

    def fetch(self, shard: ShardInfo, stop: Stop) -> None:
        """Brings a shard to where ``read`` finds it.

        Raises:
            DataError: It does not come.
            StoppedError: ``stop`` was set.
        """
        ...

    def mend(self, shard: ShardInfo) -> None:
        """Replaces a copy of a shard that is not what was packed.

        Raises:
            DataError: The shard does not come again.
        """
        ...

    def sha256(self, shard: ShardInfo) -> str:
        """The checksum of a shard as it is there now."""
        ...


def open_files(location: str | Path, cache: CacheConfig) -> SetFiles:
    """The files of the set at a location; nothing is read yet.

    Raises:
        DataError: The location is of no known kind, or needs a package that is not installed.
    """
    text = str(location)
    return RemoteFiles(text, cache) if is_remote(text) else LocalFiles(text)


def has_manifest(location: str, cache: CacheConfig) -> bool:
    """Whether a finished set is at a location.

    Raises:
        DataError: Nobody answers there.
    """
    if not is_remote(location):
        return (Path(location) / MANIFEST).is_file()
    try:
        open_files(location, cache).manifest()
    except FetchError as error:
        if error.is_final:
            return False
        raise
    return True


class LocalFiles:
    """The files of a set in a folder; each process opens its own."""

    is_remote = False

    def __init__(self, folder: str) -> None:
        self.location, self._folder = folder, Path(folder)
        self._open: OrderedDict[str, int] = OrderedDict()

    def manifest(self) -> bytes:
        """As in ``SetFiles``."""
        self._require_manifest()
        return read_whole(self._folder / MANIFEST)

    def _require_manifest(self) -> None:
        folder = self._folder
        if (folder / MANIFEST).is_file():
            return
        if not folder.is_dir():
            problem, fix = "is not there", "check the path, or pack the set with `piip-scale shards pack`"
        elif any(folder.glob(SHARD_GLOB)):
            problem = "is unfinished: it has shards but no manifest"
            fix = "run `piip-scale shards pack` again to finish it"
        else:
            problem, fix = "holds no shards", "pack a set with `piip-scale shards pack`"
        raise DataError(f"shard folder {folder} {problem}", fix=fix)

    def indexes(self, shards: Sequence[ShardInfo]) -> list[bytes]:
        """As in ``SetFiles``."""
        return [self._index(shard) for shard in shards]

    def _index(self, shard: ShardInfo) -> bytes:
        path = self._folder / shard.name
        size_bytes = _length_of(path)
        if size_bytes != shard.size_bytes:
            raise DataError(
                f"shard {path} is {'not there' if size_bytes is None else f'{size_bytes} bytes long'}",
                rule=f"its manifest says {shard.size_bytes} bytes",
                fix="copy it again, or pack the set again",
            )
        return read_whole(self._folder / shard.index_name)

    def read(self, shard: ShardInfo, ranges: Sequence[Range]) -> list[bytes]:
        """As in ``SetFiles``."""
        path = self._folder / shard.name
        try:
            descriptor = self._descriptor(shard.name)
            parts = [os.pread(descriptor, num_bytes, offset) for offset, num_bytes in ranges]
        except OSError as error:
            raise DataError(
                f"shard {path} cannot be read",
                value=os.strerror(error.errno or 0),
                fix="restore it, then start again: the run resumes where it stopped",
            ) from error
        if not _are_whole(parts, ranges):
            raise DataError(
                f"shard {path} ends before byte {max(map(sum, ranges))}",
                rule="it was cut off after it was opened",
                fix="copy it again, or pack the set again",
            )
        return parts

    def fetch(self, shard: ShardInfo, stop: Stop) -> None:
        """Nothing: it is there."""

    def mend(self, shard: ShardInfo) -> None:
        """Nothing: it is the only copy."""

    def sha256(self, shard: ShardInfo) -> str:
        """As in ``SetFiles``."""
        return sha256_of_file(self._folder / shard.name)

    def _descriptor(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > _MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(name)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


class RemoteFiles:
    """The files of a set elsewhere; shards and indexes pass through the node's cache, checked against the manifest.

    The manifest itself is read anew by everybody: it is small, and a copy that outlived the set would mislead.
    """

    is_remote = True

    def __init__(self, location: str, config: CacheConfig) -> None:
        self.location = location
        most_unsized = int(config.max_unsized_mib * 2**20)
        source = open_source(location, config.stall_seconds, most_unsized)
        self._fetcher = Fetcher(source, config.retries, most_unsized)
        self.cache = FileCache(cache_folder(config.folder), int(config.limit_gib * GIB))

    def manifest(self) -> bytes:
        """As in ``SetFiles``."""
        return self._fetcher.read(MANIFEST)

    def indexes(self, shards: Sequence[ShardInfo]) -> list[bytes]:
        """As in ``SetFiles``; whether a shard is there shows when it is fetched."""
        with ThreadPoolExecutor(_INDEXES_AT_ONCE) as pool:
            try:
                return list(pool.map(self._index, shards))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _index(self, shard: ShardInfo) -> bytes:
        entry = Entry(shard.index_sha256, None, shard.index_name)
        content = self._small(entry)
        if sha256_of(content) == shard.index_sha256:
            return content
        # A disk that lost power may have kept a name and not what belongs to it.
        self.cache.drop(entry)
        return self._small(entry)

    def _small(self, entry: Entry) -> bytes:
        fetch = partial(self._fetcher.fetch, entry.name, num_bytes=None, sha256=entry.sha256)
        with self.cache.open(entry, fetch) as file:
            file.seek(0)
            return file.read()

    def read(self, shard: ShardInfo, ranges: Sequence[Range]) -> list[bytes]:
        """As in ``SetFiles``; a shard that is not on the node yet, or no more, is fetched."""
        with self._opened(shard) as file:
            parts = [os.pread(file.fileno(), num_bytes, offset) for offset, num_bytes in ranges]
        if not _are_whole(parts, ranges):
            raise DataError(
                f"shard {shard.name} of {self.location} ends before byte {max(map(sum, ranges))}",
                rule=f"its copy in {self.cache.folder} was cut off just now",
                fix="start again: it is fetched anew",
            )
        return parts

    def fetch(self, shard: ShardInfo, stop: Stop) -> None:
        """As in ``SetFiles``."""
        self._opened(shard, stop).close()

    def mend(self, shard: ShardInfo) -> None:
        """As in ``SetFiles``."""
        with self._opened(shard) as file:
            if sha256_of_open(file) == shard.sha256:
                return
        self.cache.drop(_entry(shard))
        self.fetch(shard, NEVER)

    def sha256(self, shard: ShardInfo) -> str:
        """As in ``SetFiles``: of the copy, which was checked when it came."""
        with self._opened(shard) as file:
            return sha256_of_open(file)

    def _opened(self, shard: ShardInfo, stop: Stop = NEVER) -> BinaryIO:
        fetch = partial(self._fetcher.fetch, shard.name, num_bytes=shard.size_bytes, sha256=shard.sha256, stop=stop)
        return self.cache.open(_entry(shard), fetch, stop)


def _length_of(path: Path) -> int | None:
    """Bytes of a file, by one look; ``None`` where there is none."""
    try:
        found = path.stat()
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _entry(shard: ShardInfo) -> Entry:
    return Entry(shard.sha256, shard.size_bytes, shard.name)


def _are_whole(parts: Sequence[bytes], ranges: Sequence[Range]) -> bool:
    return all(len(part) == num_bytes for part, (_, num_bytes) in zip(parts, ranges, strict=True))
