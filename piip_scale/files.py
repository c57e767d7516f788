"""Writing so that a reader sees the old content or the new one, and never a part."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from piip_scale.errors import PiipError

_FIXES = {
    errno.ENOSPC: "free some space on that disk, then start again",
    errno.EDQUOT: "free some of your quota on that disk, then start again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), then start again",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EACCES: "choose a folder you may write, or change its permissions",
    errno.EISDIR: "name a file in it",
    errno.EEXIST: "choose another name",
    errno.EPERM: "choose a folder you may write, or change its permissions",
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


def may_pass(error: OSError) -> bool:
    """Whether the same may work a minute later, or on another machine."""
    return error.errno in _PASSING


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
        told = kind(f"cannot {action}: {reason}{named}", fix=fix)
        if may_pass(error):
            told.reason = IO_REASON
        raise told from error


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
    """Makes a folder that nobody else can write to, and makes sure of it: what lies there is trusted, or run.

    In a shared temporary folder anybody may have made it, or a link in its place, before us. So it is made first and
    looked at then, and with it every folder above, of which somebody else's owner could exchange what is below.

    Args:
        path: Made with mode 0700 where absent.
        kind: The error to raise.
        fix: What a user does where the folder cannot be trusted.

    Raises:
        PiipError: Of ``kind``: it cannot be made, or others could write to it.
    """
    with disk_errors(kind, f"make folder {path}"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The path as it is written, for links on the way, and where it leads.
        above = {*path.absolute().parents, *path.resolve().parents}
        problem = _untrusted(path.lstat(), path.stat()) or next(filter(None, map(_exchangeable, sorted(above))), "")
    if problem:
        raise kind(f"folder {path} {problem}", rule="what lies there is trusted, so it must be yours alone", fix=fix)
    return path


def _untrusted(link: os.stat_result, folder: os.stat_result) -> str:
    """Why the content of a folder, perhaps found through a link, may be somebody else's; empty where it is ours."""
    if {link.st_uid, folder.st_uid} != {os.getuid()}:
        return "belongs to another user"
    return "can be written by others" if folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


def _exchangeable(folder: Path) -> str:
    """Why somebody else can put other folders in the place of those in this one; empty where nobody can."""
    state = folder.lstat()
    if state.st_uid not in _trusted_users():
        return f"lies in {folder}, which belongs to another user"
    if state.st_mode & stat.S_IWOTH and not state.st_mode & stat.S_ISVTX and not stat.S_ISLNK(state.st_mode):
        return f"lies in {folder}, which everybody can write"
    return ""


def _trusted_users() -> set[int]:
    users = {0, os.getuid()}
    # In a container without root's rights root's own folders appear as those of nobody.
    with contextlib.suppress(OSError, ValueError):
        users.add(int(Path("/proc/sys/kernel/overflowuid").read_text()))
    return users


def sync_file(path: Path) -> None:
    """Waits until a file's, or a folder's own, content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    if durable:
        sync_file(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in one step that survives a power cut.

    Raises:
        OSError: The disk refuses; ``path`` is then as it was.
    """
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))
