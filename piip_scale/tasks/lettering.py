"""Names in pictures, legible in any script: in a font that has their letters, or spelled out."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from piip_scale.errors import KernelError
from piip_scale.text import printable

Font = ImageFont.FreeTypeFont

# Parts of files' names, best first: those that have scripts of several continents. Others come after them.
_WIDE = ("NotoSansCJK", "SourceHanSans", "wqy", "DroidSansFallback", "Arial Unicode", "msyh", "PingFang", "Hiragino")
_SUFFIXES = (".ttf", ".ttc", ".otf")
_MOST_FONTS = 200
# No font has a letter for it: what is drawn instead is the mark for letters that are not there.
_NO_LETTER = "\U0010ffff"
# No letter either, of another block: a font of last resort, as matplotlib brings, draws a sign for each block.
_NO_LETTER_OF_GREEK = "\u0378"


@dataclass(frozen=True)
class Lettering:
    r"""A text as it can be drawn.

    Attributes:
        text: On one line; letters that no font of this machine has are there without their accents, or as escapes, such
            as ``\u732b``.
        font: Has all its letters.
    """

    text: str
    font: Font

    @property
    def width_px(self) -> float:
        """How long the line is."""
        return self.font.getlength(self.text)


def lettering(text: str, size_px: int) -> Lettering:
    """A name from outside as it can be drawn: Pillow's own font draws squares for most scripts of the world.

    Args:
        text: Any text.
        size_px: Height of letters.

    Raises:
        KernelError: This Pillow draws no letters.
    """
    text, own = printable(text), own_font(size_px)
    if text.isascii() or _has(own, text):
        return Lettering(text, own)
    for path in _installed():
        font = _opened(path, size_px)
        if font is not None and _has(font, text):
            return Lettering(text, font)
    return Lettering("".join(letter if _has(own, letter) else _spelled(own, letter) for letter in text), own)


def _spelled(font: Font, letter: str) -> str:
    """A letter without its accents where that leaves any, else its number."""
    parts = unicodedata.normalize("NFKD", letter)
    bare = "".join(part for part in parts if not unicodedata.combining(part))
    return bare if bare and _has(font, bare) else letter.encode("unicode_escape").decode("ascii")


@lru_cache(maxsize=8)
def own_font(size_px: int) -> Font:
    """The font that Pillow brings: Latin letters, without accents.

    Raises:
        KernelError: This Pillow draws no letters.
    """
    font = ImageFont.load_default(size_px)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise KernelError(
            "Pillow was built without FreeType", rule="drawing writes names", fix="install Pillow's wheel"
        )
    return font


def _has(font: Font, text: str) -> bool:
    missing = (_glyph(font, _NO_LETTER), None)
    return all(letter.isspace() or _glyph(font, letter) not in missing for letter in dict.fromkeys(text))


@lru_cache(maxsize=4096)
def _glyph(font: Font, letter: str) -> tuple[tuple[int, int], bytes] | None:
    """How a font draws a letter; ``None`` where it cannot."""
    try:
        mask = font.getmask(letter)
    except ValueError:
        # libraqm gives up on joiners and variation selectors in fonts that have no space to put for them.
        return None
    return mask.size, bytes(mask)


@lru_cache(maxsize=64)
def _opened(path: Path, size_px: int) -> Font | None:
    try:
        font = ImageFont.truetype(str(path), size_px)
    except OSError:
        # Bitmaps and broken files lie among fonts: the next one is tried.
        return None
    return font if _glyph(font, _NO_LETTER) == _glyph(font, _NO_LETTER_OF_GREEK) else None


@lru_cache(maxsize=1)
def _installed() -> tuple[Path, ...]:
    """Fonts of this machine: the plain face of each, those of many scripts first, then by name."""
    files = {path for folder in _folders() if folder.is_dir() for path in _plain_faces(folder)}

    def rank(path: Path) -> tuple[int, str]:
        return next((place for place, part in enumerate(_WIDE) if part in path.name), len(_WIDE)), str(path)

    return tuple(sorted(files, key=rank)[:_MOST_FONTS])


def _plain_faces(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        for name in names:
            styled = any(style in name for style in ("Bold", "Italic", "Oblique", "Mono", "Serif"))
            if name.lower().endswith(_SUFFIXES) and not styled:
                yield Path(root, name)


def _folders() -> Iterator[Path]:
    yield from (Path.home() / ".fonts", Path.home() / ".local/share/fonts")
    yield from (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), Path("/System/Library/Fonts"))
    # Where no system font is, a notebook's plots often bring one.
    yield Path(sys.prefix, "lib", f"python3.{sys.version_info.minor}", "site-packages/matplotlib/mpl-data/fonts/ttf")
