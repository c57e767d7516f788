"""Counts what a process asks of a file system: opening, looking, making, renaming, removing, waiting for the disk."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
_counting: list[tuple[str, Counter[str]]] = []
_hooked = threading.Lock()


def _count(event: str, arguments: tuple[object, ...]) -> None:
    if _counting and event in _AUDITED and arguments and isinstance(arguments[0], str | bytes | os.PathLike):
        _add(event.removeprefix("os."), arguments[0])


def _add(what: str, path: object) -> None:
    name = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]
    for folder, counts in list(_counting):
        if name == folder or name.startswith(folder + os.sep):
            counts[what] += 1


@contextlib.contextmanager
def count_operations(folder: Path) -> Iterator[Counter[str]]:
    """Operations by kind, of this process, on what lies in a folder; C++ code's own files are not seen."""
    if _hooked.acquire(blocking=False):
        sys.addaudithook(_count)
    looks = {name: getattr(os, name) for name in _LOOKS}

    def counted(name: str) -> Callable[..., Any]:
        def look(path: Any, *rest: Any, **more: Any) -> Any:
            if not isinstance(path, int):
                _add(name, path)
            return looks[name](path, *rest, **more)

        return look

    entry: tuple[str, Counter[str]] = (os.path.abspath(folder), Counter())
    _counting.append(entry)
    for name in _LOOKS:
        setattr(os, name, counted(name))
    try:
        yield entry[1]
    finally:
        for name, look in looks.items():
            setattr(os, name, look)
        _counting.remove(entry)
