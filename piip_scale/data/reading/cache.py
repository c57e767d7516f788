"""Whole files of remote sets on a disk of the node, shared by everybody there and never above a limit.

A file's name is its checksum and an ending of ours, so one cache serves any number of sets, and a set packed anew never
meets its old shards. While a file comes it is ``CHECKSUM.part``, as large as it will be from the start, and locked by
whoever fetches it; the kernel drops the lock when that process dies, and the next one takes the part over. A file takes
its name once it is whole. Room is made and reserved, and names are taken, under a lock on the folder. Readers hold no
file open between two reads, so what is evicted frees its disk space at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from piip_scale.data.reading.sources import NEVER, Stop, StoppedError
from piip_scale.errors import DataError
from piip_scale.files import disk_errors, private_folder, temporary_folder

GIB = 2**30

_WHOLE = ".cached"
_PART = ".part"
_CHECKSUM = re.compile(r"[0-9a-f]{64}")
# Other tools name files by their bare checksums; only these are counted, evicted or replaced.
_OURS = re.compile(r"[0-9a-f]{64}\.(cached|part)")
# A lock on the folder is held for less than a millisecond, one on a part for as long as its file takes to come.
_FIRST_POLL_S, _LONGEST_POLL_S = 0.001, 0.05


@dataclass(frozen=True)
class Entry:
    """A file that belongs into the cache.

    Attributes:
        sha256: Of its content, 64 hexadecimal digits: it comes from a set, and becomes a file's name.
        num_bytes: Its length; ``None`` for a small file whose length is known once it is there.
        name: What its set calls it.
    """

    sha256: str
    num_bytes: int | None
    name: str

    def __post_init__(self) -> None:
        if not _CHECKSUM.fullmatch(self.sha256):
            raise DataError(f"checksum of {self.name}", value=self.sha256, rule="it has 64 hexadecimal digits")

    @property
    def file_name(self) -> str:
        """Its name in the cache."""
        return f"{self.sha256}{_WHOLE}"


def cache_folder(folder: str) -> Path:
    """The folder that ``data.cache.folder`` means.

    Raises:
        DataError: ``auto`` would take a folder that others can write, or there is none.
    """
    if folder != "auto":
        return Path(folder)
    path = temporary_folder() / f"piip_scale_cache_{os.getuid()}"
    return private_folder(path, DataError, fix="set data.cache.folder")


class FileCache:
    """Files by checksum, in one folder. Any number of processes and threads may use it at once.

    Args:
        folder: Made where absent.
        limit_bytes: What all of it may take together.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes

    def open(self, entry: Entry, fill: Callable[[BinaryIO], None], stop: Stop = NEVER) -> BinaryIO:
        """A file, open for reading; whoever comes first fetches it, and the others wait for that.

        What is open stays readable, whatever is evicted meanwhile.

        Args:
            entry: The file.
            fill: Writes its content, checked, into an empty file.
            stop: Ends the waiting when set.

        Raises:
            DataError: It does not fit, the disk refuses, or ``fill`` raised it.
            StoppedError: ``stop`` was set.
        """
        while True:
            if (file := self.find(entry)) is not None:
                return file
            with self._errors(f"cache {entry.name}"), self._claimed(entry, stop) as part:
                if part is None or self._path(entry).exists():
                    continue
                self._fill(part, entry, fill, stop)
                # Under the lock: whoever adds up the folder meanwhile could see neither the old name nor the new one.
                with self._locked_folder(stop):
                    os.replace(self._part(entry), self._path(entry))
                # Of its own, which the lock's end does not close: it may be evicted before anybody opens it again.
                return os.fdopen(os.dup(part.fileno()), "rb")

    def find(self, entry: Entry) -> BinaryIO | None:
        """A file that is there, open for reading, and marked as used just now; one of another length is dropped."""
        with self._errors(f"read {entry.name}"):
            try:
                descriptor = os.open(self._path(entry), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
            file = os.fdopen(descriptor, "rb")
            if entry.num_bytes not in (None, os.fstat(descriptor).st_size):
                file.close()
                self.drop(entry)
                return None
            os.utime(descriptor)
            return file

    def drop(self, entry: Entry) -> None:
        """Removes a file, so that the next one who needs it fetches it again."""
        with self._errors(f"drop {entry.name}"):
            self._path(entry).unlink(missing_ok=True)

    def _path(self, entry: Entry) -> Path:
        return self.folder / entry.file_name

    def _part(self, entry: Entry) -> Path:
        return self.folder / f"{entry.sha256}{_PART}"

    @contextlib.contextmanager
    def _claimed(self, entry: Entry, stop: Stop) -> Iterator[BinaryIO | None]:
        """The part of a file, empty and locked; ``None`` where somebody else finished it meanwhile."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._part(entry)
        with _descriptor(path, os.O_RDWR | os.O_CREAT) as descriptor, _lock(descriptor, stop):
            if not _is_at(descriptor, path):
                yield None
                return
            try:
                os.ftruncate(descriptor, 0)
                with open(descriptor, "r+b", closefd=False) as file:
                    yield file
            finally:
                # Renamed it is no part any more, and its name may be somebody else's part.
                if _is_at(descriptor, path):
                    path.unlink()

    def _fill(self, part: BinaryIO, entry: Entry, fill: Callable[[BinaryIO], None], stop: Stop) -> None:
        if entry.num_bytes is not None:
            self._reserve(part, entry.num_bytes, entry.name, stop)
            fill(part)
        else:
            content = io.BytesIO()
            fill(content)
            self._reserve(part, content.tell(), entry.name, stop)
            part.write(content.getbuffer())
        part.flush()

    def _reserve(self, part: BinaryIO, num_bytes: int, name: str, stop: Stop) -> None:
        """Makes the part as large as the file will be, once there is room."""
        if num_bytes > self.limit_bytes:
            raise DataError(
                f"{name} of {num_bytes / GIB:.3g} GiB does not fit into the cache {self.folder}",
                rule=f"data.cache.limit_gib={self.limit_bytes / GIB:.3g}",
                fix="raise it, or pack the set in smaller shards",
            )
        while True:
            with self._locked_folder(stop):
                if self._has_room(part, num_bytes):
                    return
            # Others fetch as well, and what they fetch cannot go before they are done.
            if stop.wait(_LONGEST_POLL_S):
                raise StoppedError

    @contextlib.contextmanager
    def _locked_folder(self, stop: Stop) -> Iterator[None]:
        with _descriptor(self.folder.resolve(), os.O_RDONLY) as folder, _lock(folder, stop):
            yield

    def _has_room(self, part: BinaryIO, num_bytes: int) -> bool:
        files, of_files, of_parts = self._contents(os.fstat(part.fileno()).st_ino)
        while of_files + of_parts + num_bytes > self.limit_bytes:
            if not files:
                return False
            of_files -= _remove(files.pop())
        while not _allocated(part, num_bytes, or_raise=not files and not of_parts):
            if not files:
                return False
            _remove(files.pop())
        return True

    def _contents(self, own_inode: int) -> tuple[list[Path], int, int]:
        """Whole files, those used last first, their bytes, and those of others' parts; dead parts are removed."""
        ages: list[tuple[int, Path]] = []
        of_files = of_parts = 0
        for item in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                state = item.stat(follow_symlinks=False)
                is_ours = _OURS.fullmatch(item.name) and item.is_file(follow_symlinks=False)
                if not is_ours or state.st_ino == own_inode:
                    continue
                path = Path(item.path)
                if item.name.endswith(_PART):
                    of_parts += 0 if _remove_dead(path) else state.st_size
                else:
                    ages.append((state.st_mtime_ns, path))
                    of_files += state.st_size
        return [path for _, path in sorted(ages, reverse=True)], of_files, of_parts

    def _errors(self, action: str) -> contextlib.AbstractContextManager[None]:
        return disk_errors(DataError, f"{action} in {self.folder} (data.cache.folder)")


@contextlib.contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    # A link in the place of a file of ours would have us empty the file that it names.
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lock(descriptor: int, stop: Stop) -> Iterator[None]:
    """A lock that goes with the process; loader processes forked meanwhile hold none, once it is given back here."""
    pause_s = _FIRST_POLL_S
    while not _try_lock(descriptor):
        if stop.wait(pause_s):
            raise StoppedError
        pause_s = min(2 * pause_s, _LONGEST_POLL_S)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _allocated(part: BinaryIO, num_bytes: int, *, or_raise: bool) -> bool:
    """Gives a part its whole length on the disk; false where that is full, as it is with others' files too."""
    try:
        os.posix_fallocate(part.fileno(), 0, max(num_bytes, 1))
        os.ftruncate(part.fileno(), num_bytes)
    except OSError as error:
        part.truncate(0)
        if or_raise or error.errno != errno.ENOSPC:
            raise
        return False
    return True


def _remove(path: Path) -> int:
    """Removes a file; returns how large it was."""
    try:
        num_bytes = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return num_bytes


def _remove_dead(path: Path) -> bool:
    """Removes a part that nobody holds any more; false where somebody does."""
    with _descriptor(path, os.O_RDONLY) as descriptor:
        if not _try_lock(descriptor):
            return False
        if _is_at(descriptor, path):
            path.unlink()
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return True
