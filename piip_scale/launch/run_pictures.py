"""Pictures that a run's last evaluation left in its directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PICTURES = "pictures"
_MOST, _MOST_BYTES = 8, 4 << 20
_KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}


@dataclass(frozen=True)
class FoundPicture:
    """A picture's file.

    Attributes:
        name: Where it is, inside the run's pictures.
        kind: ``png`` or ``jpeg``.
        content: Its bytes.
    """

    name: str
    kind: str
    content: bytes


def last_pictures(run_dir: Path) -> list[FoundPicture]:
    """The pictures of the newest evaluation in ``pictures/``; none where there are none that can be read."""
    folder = run_dir / PICTURES
    with suppress(OSError):
        newest = max((path for path in folder.iterdir() if path.is_dir()), key=_age, default=folder)
        return list(_read(sorted(newest.iterdir()), folder))[:_MOST]
    return []


def _age(path: Path) -> tuple[float, str]:
    return path.stat().st_mtime, path.name


def _read(paths: list[Path], folder: Path) -> Iterator[FoundPicture]:
    for path in paths:
        kind = _KINDS.get(path.suffix.lower())
        if kind is not None and path.is_file() and path.stat().st_size <= _MOST_BYTES:
            yield FoundPicture(str(path.relative_to(folder)), kind, path.read_bytes())
