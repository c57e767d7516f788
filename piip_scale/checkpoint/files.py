"""Writing so that a reader sees the old content or the new one, and never a part."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from piip_scale.errors import PiipError

_FIXES = {
    errno.ENOSPC: "free some space on that disk, then start again",
    errno.EDQUOT: "free some of your quota on that disk, then start again",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EACCES: "choose a folder you may write, or change its permissions",
    errno.EPERM: "choose a folder you may write, or change its permissions",
}


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
        raise kind(f"cannot {action}: {reason}{named}", fix=fix) from error


def sync_file(path: Path) -> None:
    """Waits until a file's, or a folder's own, content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in one step that survives a power cut.

    Raises:
        OSError: The disk refuses; ``path`` is then as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_file(path.parent)
