"""Finding the files that annotations name, by the names that tools and systems make of them."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
"""What torchvision's ``ImageFolder`` takes, in any case."""


class ImageFolder:
    """A folder of images, looked into by names that may be spelled otherwise than on disk.

    Attributes:
        path: The folder.
        num_respelled: Names that were found under another spelling.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.num_respelled = path, 0
        self._listings: dict[str, dict[str, list[str]]] = {}

    def find(self, name: str) -> tuple[str, int] | None:
        """The name of a file under the folder as it is on disk, and its bytes; ``None`` where none is meant alone.

        Backslashes (Windows), percent signs (URLs), decomposed letters (macOS) and the case of letters are looked
        through, in this order, and only where the name itself is not there.
        """
        for number, spelling in enumerate(_spellings(name)):
            if (num_bytes := self._bytes_of(spelling)) is not None:
                self.num_respelled += number > 0
                return str(PurePosixPath(spelling)), num_bytes
        for spelling in _spellings(name):
            alike = self._alike(spelling)
            if alike is not None and (num_bytes := self._bytes_of(alike)) is not None:
                self.num_respelled += 1
                return alike, num_bytes
        return None

    def file_of_that_name(self, name: str) -> str | None:
        """A file right in the folder that has the last part of a name, for a hint."""
        last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
        return last if last and last != name and self._bytes_of(last) is not None else None

    def _bytes_of(self, name: str) -> int | None:
        """Size of a regular file: a pipe of that name would never end."""
        if not is_below(name):
            return None
        try:
            status = os.stat(self.path / name)
        # A zero byte, half a pair: no path.
        except (OSError, ValueError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def _alike(self, name: str) -> str | None:
        found = ""
        for part in PurePosixPath(name).parts:
            listing = self._listing(found)
            names = listing.get(_folded(part), [])
            exact = [one for one in names if unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", part)]
            if len(exact or names) != 1:
                return None
            found = f"{found}/{(exact or names)[0]}".lstrip("/")
        return found or None

    def _listing(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._listings:
            listing: dict[str, list[str]] = defaultdict(list)
            try:
                for name in sorted(os.listdir(self.path / folder)):
                    listing[_folded(name)].append(name)
            except OSError:
                listing.clear()
            self._listings[folder] = dict(listing)
        return self._listings[folder]


def is_below(name: str) -> bool:
    """Whether a relative name stays under its folder."""
    return bool(name) and not os.path.isabs(name) and ".." not in PurePosixPath(name).parts


def _spellings(name: str) -> Iterator[str]:
    yield name
    slashed = name.replace("\\", "/")
    if slashed != name:
        yield slashed
    if (plain := unquote(slashed, errors="surrogateescape")) != slashed:
        yield plain


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
