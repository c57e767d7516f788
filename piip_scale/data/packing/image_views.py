"""Which view of a set's images its annotations are of, and of what size: decided for the whole set before it is packed.

An image may say in its EXIF data that it is to be turned, and its annotations may be of the turned or of the stored
view. Their size tells for most such images, not for square ones and not for half turns; these follow the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from piip_scale.data.images import MAX_PIXELS, image_facts, may_be_turned, read_file
from piip_scale.data.orientation import (
    UPRIGHT,
    Exif,
    StatedSize,
    Undecided,
    oriented_size,
    resolve_orientation,
    view_of_size,
)
from piip_scale.errors import DataError
from piip_scale.logging import get_logger
from piip_scale.text import printable

_THREADS = 16
# EXIF data stand at the start of a JPEG, within 64 KB: the rest of it need not be read.
_HEAD_BYTES = 1 << 17
_JPEG_MARK = b"\xff\xd8"

StatedOf = Callable[[], StatedSize]


@dataclass(frozen=True)
class Views:
    """How the images of a set are seen.

    Attributes:
        exif: What becomes of orientations, as the user asks for it.
        undecided: What becomes of one that no size decides, where other images show it.
        max_pixels: Images of more are refused.
    """

    exif: Exif = "auto"
    undecided: Undecided | None = None
    max_pixels: int = MAX_PIXELS

    def size_px(self, path: Path, stated: StatedSize, owner: str) -> tuple[int, int]:
        """Height and width of the view that the annotations are of; what is not stated is the file's.

        Raises:
            DataError: The file cannot be read, or has another size than the side that is stated.
        """
        height, width = stated
        if height is not None and width is not None:
            return height, width
        facts = image_facts(read_file(path), printable(str(path)), max_pixels=self.max_pixels)
        turn = resolve_orientation(facts, self.exif, stated, self.undecided)
        size_px = oriented_size(facts.stored_size_px, turn.number)
        if any(side not in (None, own) for side, own in zip(stated, size_px, strict=True)):
            raise DataError(
                f"{owner} has height, width {stated}",
                rule=f"its file is {size_px[1]} px wide and {size_px[0]} px high",
                fix="correct the side, or remove both",
            )
        return size_px


def views_of(images: Iterable[tuple[Path, StatedOf]], exif: Exif, max_pixels: int, source: str) -> Views:
    """Looks at the headers of a set's images and decides what becomes of orientations that no size decides.

    Args:
        images: Files, and what states the size of their annotations.
        exif: What the user asks for; only ``auto`` leaves anything to decide.
        max_pixels: Images of more are refused.
        source: What the set is called when the decision is logged.
    """
    if exif != "auto":
        return Views(exif, None, max_pixels)
    with ThreadPoolExecutor(_THREADS) as threads:
        counts = Counter(threads.map(partial(_view, max_pixels), images))
    turned, stored, open_ones = counts["apply"], counts["stored"], counts["open"]
    undecided: Undecided | None = None
    if turned and not stored:
        undecided = "apply"
    elif stored and not turned:
        undecided = "stored"
    _log(source, turned, stored, open_ones, undecided)
    return Views(exif, undecided, max_pixels)


def _view(max_pixels: int, image: tuple[Path, StatedOf]) -> str:
    """``apply``, ``stored`` or ``open``; empty for an image without an orientation, or that cannot be read."""
    path, stated = image
    try:
        content = _head(path)
        if not may_be_turned(content):
            return ""
        facts = image_facts(content, str(path), max_pixels=max_pixels)
        if facts.orientation == UPRIGHT:
            return ""
        return view_of_size(facts, stated()) or "open"
    # What is wrong with it is reported when it is packed.
    except (DataError, OSError, ValueError):
        return ""


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        return head if head.startswith(_JPEG_MARK) else head + file.read()


def _log(source: str, turned: int, stored: int, open_ones: int, undecided: Undecided | None) -> None:
    if not turned + stored + open_ones:
        return
    parts = [f"{turned} are annotated as turned"] * bool(turned) + [f"{stored} as stored"] * bool(stored)
    if open_ones:
        done = "stay as they are stored" if undecided == "stored" else "are turned"
        parts.append(f"{open_ones} fit both by their size and {done}" + ", as the others" * (undecided is not None))
    # Where sizes contradict each other, or say nothing, this is a guess.
    advice = "; --exif apply or stored decides for all" if undecided is None else ""
    get_logger(__name__).warning("%s: of the images with an EXIF orientation %s%s", source, ", ".join(parts), advice)
