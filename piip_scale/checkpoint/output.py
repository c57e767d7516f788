"""A file or folder that is whole under its name or not there, and the manifest beside it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from piip_scale.checkpoint.journal import Journal
from piip_scale.errors import CheckpointError
from piip_scale.files import sync_file

_MANIFEST = "manifest.json"
# Disks of clusters that know no locks: there nobody can tell who else is writing.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


def manifest_path(out: Path) -> Path:
    """Where an output's manifest lies: beside a file, inside a folder."""
    return out.with_name(f"{out.stem}.{_MANIFEST}") if out.suffix else out / f"model.{_MANIFEST}"


def is_manifest(path: Path) -> bool:
    """Whether a file is a manifest of ours, which without its output is of no use to anybody."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"format", "checkpoint", "tensors"} <= content.keys()


class Replacing:
    """A hidden path beside ``out`` that takes its place when all went well, and vanishes when not.

    What a killed process left there is begun again, or stays where its journal is of the same conversion. Its manifest,
    where ``write_manifest`` wrote one, comes after it: an output is never beside the manifest of another.

    Args:
        out: The path to come.
        is_folder: A folder, not a file.
        identity: Of what is written, by ``identity_of``; empty where nothing is to go on after a kill.

    Attributes:
        journal: Notes what is done; ``None`` without an identity.

    Raises:
        CheckpointError: Another process is writing it.
        OSError: The disk refuses; so do all methods, and ``out`` is as it was then.
    """

    def __init__(self, out: Path, *, is_folder: bool, identity: str = "") -> None:
        self._identity = identity
        self.journal: Journal | None = None
        self._out, self._is_folder = out, is_folder
        self._old = out.with_name(f".{out.name}.replaced")
        self._manifest = None if is_folder else manifest_path(out)
        self._locked = -1
        self._noted = out.with_name(f".{out.name}.journal")
        self.path = out.with_name(f".{out.name}.partial")

    def __enter__(self) -> Replacing:
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._locked = _lock(self.path, self._is_folder)
        if self._identity:
            self.journal = Journal(self._noted, self._identity)
        if self._is_folder and not (self.journal and self.journal.goes_on):
            for left in self.path.iterdir():
                _remove(left)
        return self

    def write_manifest(self, content: str) -> None:
        """Writes the manifest, not yet under its name."""
        path = _hidden(self._manifest) if self._manifest else self.path / manifest_path(self._out).name
        path.write_text(content, encoding="utf-8")
        sync_file(path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _replaced(self._manifest):
                    self._swap()
        finally:
            _remove(self.path)
            if self._manifest is not None:
                _remove(_hidden(self._manifest))
            if self.journal is not None:
                self.journal.close()
            _remove(self._noted)
            os.close(self._locked)

    def _swap(self) -> None:
        _remove(self._old)
        # A rename replaces a file in one step, but never a folder that has content: that one steps aside first.
        aside = self._out.exists() and (self._out.is_dir() or self._is_folder)
        if aside:
            os.rename(self._out, self._old)
        try:
            os.replace(self.path, self._out)
        except OSError:
            if aside:
                os.rename(self._old, self._out)
            raise
        sync_file(self._out.parent)
        _remove(self._old)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def _replaced(manifest: Path | None) -> Iterator[None]:
    """Takes the old manifest away before, puts the new one there after, or the old one back."""
    if manifest is None:
        yield
        return
    old = manifest.with_name(f".{manifest.name}.replaced")
    _remove(old)
    with contextlib.suppress(FileNotFoundError):
        os.rename(manifest, old)
    try:
        yield
    except OSError:
        if old.exists():
            os.rename(old, manifest)
        raise
    os.rename(_hidden(manifest), manifest)
    sync_file(manifest.parent)
    _remove(old)


def _lock(path: Path, is_folder: bool) -> int:
    """An open descriptor of a path that is made where absent, held by this process alone."""
    while True:
        if is_folder:
            path.mkdir(exist_ok=True)
        found = os.open(path, os.O_RDONLY | (0 if is_folder else os.O_CREAT), 0o666)
        try:
            fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(found)
            raise CheckpointError(f"another process is writing {path}", fix="wait for it, or end it") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(found)
                raise
        # Whoever held it may have renamed it meanwhile: then this is what the output was just replaced by.
        if path.exists() and os.path.samestat(os.fstat(found), path.stat()):
            return found
        os.close(found)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
