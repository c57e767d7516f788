"""Counts what processes ask of a file system: opening, looking, making, renaming, removing, waiting for the disk."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Note = Callable[[str, str], None]
"""Is told what is done, and to which path."""

_AUDITED = {
    "open",
    "os.listdir",
    "os.scandir",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
}
# Which Python's audit does not report.
_LOOKS = ("stat", "lstat", "access")
_noting: list[tuple[str, Note]] = []
_hooked = threading.Lock()


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _noting and event in _AUDITED and arguments and isinstance(arguments[0], str | bytes | os.PathLike):
        _note(event.removeprefix("os."), arguments[0])


def _note(what: str, path: object) -> None:
    name = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]
    for folder, note in list(_noting):
        if name == folder or name.startswith(folder + os.sep):
            note(what, name)


@contextlib.contextmanager
def noted_operations(folder: Path, note: Note) -> Iterator[None]:
    """Tells of each operation of this process, its kind and path, in a folder; C++ code's own files are not seen."""
    looks = {name: getattr(os, name) for name in _LOOKS}
    entry = _begin(folder, note)
    try:
        yield
    finally:
        for name, look in looks.items():
            setattr(os, name, look)
        _noting.remove(entry)


def _begin(folder: Path, note: Note) -> tuple[str, Note]:
    if _hooked.acquire(blocking=False):
        sys.addaudithook(_audit)
    looks = {name: getattr(os, name) for name in _LOOKS}

    def noted(name: str) -> Callable[..., Any]:
        def look(path: Any, *rest: Any, **more: Any) -> Any:
            if not isinstance(path, int):
                _note(name, path)
            return looks[name](path, *rest, **more)

        return look

    entry = (os.path.abspath(folder), note)
    _noting.append(entry)
    for name in _LOOKS:
        setattr(os, name, noted(name))
    return entry


@contextlib.contextmanager
def count_operations(folder: Path) -> Iterator[Counter[str]]:
    """Operations by kind, of this process, on what lies in a folder."""
    counts: Counter[str] = Counter()

    def count(what: str, _: str) -> None:
        counts[what] += 1

    with noted_operations(folder, count):
        yield counts


def log_operations(folder: Path, log: Path) -> None:
    """Has this process, and those forked from it, put down their operations in a folder from now on."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def put_down(what: str, name: str) -> None:
        os.write(file, f"{os.getpid()} {what} {name}\n".encode())

    _begin(folder, put_down)


def logged_operations(log: Path) -> dict[int, Counter[tuple[str, str]]]:
    """What was put down: by process, how often it did what to which file."""
    found: dict[int, Counter[tuple[str, str]]] = {}
    for line in log.read_text().splitlines():
        pid, what, name = line.split(" ", 2)
        found.setdefault(int(pid), Counter())[what, name] += 1
    return found
