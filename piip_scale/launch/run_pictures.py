"""Pictures that a run's last evaluation left in its directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PICTURES = "pictures"
"""The folder in what an evaluation writes."""
_MOST, _MOST_BYTES = 6, 4 << 20
_KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}


@dataclass(frozen=True)
class FoundPicture:
    """A picture's file.

    Attributes:
        name: Where it is, inside the run.
        kind: ``png`` or ``jpeg``.
        content: Its bytes.
    """

    name: str
    kind: str
    content: bytes


def last_pictures(run_dir: Path) -> list[FoundPicture]:
    """The pictures of the newest evaluation written into a run, the worst first; none where none can be read.

    Looks into ``pictures/`` of each folder in it, as ``evaluate RUN --out RUN/scores`` leaves them.
    """
    with suppress(OSError):
        newest = max(run_dir.glob(f"*/{PICTURES}"), key=_age, default=None)
        if newest is not None:
            return list(_read(newest, run_dir))[:_MOST]
    return []


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _read(folder: Path, run_dir: Path) -> Iterator[FoundPicture]:
    for path in sorted(folder.iterdir(), key=lambda path: (not path.name.startswith("worst"), path.name)):
        kind = _KINDS.get(path.suffix.lower())
        if kind is not None and path.is_file() and path.stat().st_size <= _MOST_BYTES:
            yield FoundPicture(str(path.relative_to(run_dir)), kind, path.read_bytes())
