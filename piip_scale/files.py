"""Writing so that a reader sees the old content or the new one, and never a part."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from piip_scale.errors import PiipError

LACKS_MEMORY_FIX = "raise the limit on virtual memory (ulimit -v unlimited), or run where there is more"
_FIXES = {
    errno.ENOSPC: "free some space on that disk, then start again",
    errno.EDQUOT: "free some of your quota on that disk, then start again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), then start again",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EACCES: "choose a folder you may write, or change its permissions",
    errno.EISDIR: "name a file in it",
    errno.EEXIST: "choose another name",
    errno.EPERM: "choose a folder you may write, or change its permissions",
    errno.ENOMEM: LACKS_MEMORY_FIX,
}

# A disk or a network says so that may be well again, or emptier, a minute later; a wrong path stays wrong.
_PASSING = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.EREMOTEIO,
}
IO_REASON = "input or output"
_CHUNK_BYTES = 16 << 20


def may_pass(error: OSError) -> bool:
    """Whether the same may work a minute later, or on another machine."""
    return error.errno in _PASSING


def lacks_memory(error: BaseException) -> bool:
    """Whether there was no room in memory or address space, which says nothing of the file that was read."""
    is_refused = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    # torch and safetensors wrap what mmap said into their own types.
    return is_refused or os.strerror(errno.ENOMEM) in str(error)


def available_memory_bytes() -> int:
    """Memory of this machine that processes can have without swapping; 0 where the system does not tell."""
    facts = Path("/proc/meminfo")
    lines = facts.read_text(encoding="ascii").splitlines() if facts.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


@contextlib.contextmanager
def disk_errors(kind: type[PiipError], action: str) -> Iterator[None]:
    """Turns a refusal of the file system into one line of ``kind``.

    Args:
        kind: The error to raise.
        action: What was being done and to what, as in ``save checkpoint /runs/a``.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        named = f" ({error.filename})" if error.filename else ""
        fix = _FIXES.get(error.errno or 0, "")
        refused = kind(f"cannot {action}: {reason}{named}", fix=fix)
        if may_pass(error):
            refused.reason = IO_REASON
        raise refused from error


def temporary_folder() -> Path:
    """The folder for what need not last: $TMPDIR, or the system's where that is not set, absent or read-only.

    Raises:
        PiipError: There is none that can be written.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise PiipError(
            "no temporary folder can be written", value=str(error), fix="set TMPDIR to a folder that can"
        ) from None


def private_folder(path: Path, kind: type[PiipError], *, fix: str) -> Path:
    """Makes a folder of this user alone, and makes sure of it: what lies there is trusted, or run.

    In a shared temporary folder anybody may have made it, or a link in its place, before us. So it is made first and
    looked at then.

    Args:
        path: Made with mode 0700 where absent.
        kind: The error to raise.
        fix: What a user does where the folder cannot be trusted.

    Raises:
        PiipError: Of ``kind``: it cannot be made, or others could write to it.
    """
    return _made_and_trusted(path, kind, fix, is_shared=False)


def named_folder(path: Path, kind: type[PiipError], *, fix: str) -> Path:
    """Makes a folder that the user named for what is run, and makes sure that not everybody can put something there.

    Whom a user shares it with, by a group or in a folder of a project, is the user's to choose.

    Raises:
        PiipError: As in ``private_folder``.
    """
    return _made_and_trusted(path, kind, fix, is_shared=True)


def _made_and_trusted(path: Path, kind: type[PiipError], fix: str, *, is_shared: bool) -> Path:
    with disk_errors(kind, f"make folder {path}"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = _untrusted(path, is_shared) or next(filter(None, map(_exchangeable, _steps(path))), "")
    if problem:
        raise kind(f"folder {path} {problem}", rule="what lies there is trusted, and may be run", fix=fix)
    return path


def _untrusted(path: Path, is_shared: bool) -> str:
    """Why somebody else may have put something into a folder, perhaps found through a link; empty where nobody has."""
    folder, own = path.stat(), os.getuid()
    if not is_shared and {path.lstat().st_uid, folder.st_uid} != {own}:
        return "belongs to another user"
    forbidden = stat.S_IWOTH if is_shared else stat.S_IWOTH | stat.S_IWGRP
    return "can be written by others" if folder.st_mode & forbidden else ""


def _steps(path: Path) -> list[Path]:
    """A path and every folder above it, as it is written and as links lead."""
    written, real = path.absolute(), path.resolve()
    return [*dict.fromkeys([written, *written.parents, real, *real.parents])]


def _exchangeable(path: Path) -> str:
    """Why anybody could have put something else in the place of a file or folder; empty where nobody could."""
    above = path.parent.stat()
    if not above.st_mode & stat.S_IWOTH:
        return ""
    if not above.st_mode & stat.S_ISVTX:
        return f"lies in {path.parent}, which everybody can write"
    # There anybody makes files and links, and nobody moves another's.
    return "" if path.lstat().st_uid in (0, os.getuid()) else f"lies in or at {path}, which belongs to another user"


def sync_file(path: Path) -> None:
    """Waits until a file's, or a folder's own, content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum_of(paths: Iterable[Path]) -> tuple[int, int]:
    """Bytes of files and the CRC-32 of all these bytes, one file after the other.

    Raises:
        OSError: One cannot be read.
    """
    num_bytes = crc = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                num_bytes, crc = num_bytes + len(chunk), zlib.crc32(chunk, crc)
    return num_bytes, crc


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file that takes its name only once it is complete.

    Args:
        path: Its final name; missing folders are made.
        durable: Also wait until it is on the disk, so that it survives a power cut.

    Raises:
        OSError: The disk refuses, or ``path`` is there and no file; it is then as it was.
    """
    # A rename onto a device would put a file in its place: for root, onto /dev/null too.
    if path.exists() and not path.is_file():
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise FileExistsError(errno.EEXIST, "It is there and is not a regular file", str(path))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if durable:
            _take_name(part, path)
        else:
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _take_name(part: Path, path: Path) -> None:
    """Renames a file, and waits until its folder has it on the disk."""
    # Open before: who waits for the file may rename its folder as soon as it is there.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.replace(part, path)
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in one step that survives a power cut.

    Raises:
        OSError: The disk refuses; ``path`` is then as it was.
    """
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def write_briefly(path: Path, text: str) -> None:
    """Replaces a small file that is soon replaced again, in as few operations as can be; the old one stays if it fails.

    Thousands of ranks may share the disk, and the folder is nearly always there.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with contextlib.suppress(OSError):
        try:
            part.write_text(text, encoding="utf-8")
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
        os.replace(part, path)
