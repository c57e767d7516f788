"""Which way up an image is: what its file says, what annotations assume, and which of both is followed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

UPRIGHT = 1
"""EXIF's number for a file whose pixels are stored as they are to be seen."""

Exif = Literal["auto", "apply", "stored"]
"""What becomes of an orientation in a file: turned, as stored, or by the size that annotations state."""

Undecided = Literal["apply", "stored"]
"""What becomes of an orientation that no size decides, by what the other images of its set show."""

StatedSize = tuple[int | None, int | None]
"""Height and width in px, either of which may not be stated."""

_INVERSE = {6: 8, 8: 6}
_SIDES_SWAPPED = frozenset({5, 6, 7, 8})


@dataclass(frozen=True)
class ImageFacts:
    """What the header of an image file says.

    Attributes:
        format: Pillow's name of it.
        mode: Pillow's name of its pixels' kind.
        stored_size_px: Height and width of the pixels as they are stored.
        orientation: EXIF's number, 1 to 8; 1 where there is none.
        flaw: What was wrong with the header and could be overlooked; empty where nothing was.
    """

    format: str
    mode: str
    stored_size_px: tuple[int, int]
    orientation: int
    flaw: str = ""

    @property
    def upright_size_px(self) -> tuple[int, int]:
        """Height and width once the orientation is applied."""
        return oriented_size(self.stored_size_px, self.orientation)


@dataclass(frozen=True)
class Orientation:
    """How an image is to be turned.

    Attributes:
        number: EXIF's number of what is applied; 1 leaves the pixels as they are stored.
        is_guess: Neither the user nor a size decided it, and the file has an orientation.
        is_left: The file has an orientation that is not applied.
    """

    number: int
    is_guess: bool = False
    is_left: bool = False


def resolve_orientation(
    facts: ImageFacts, exif: Exif, size_px: StatedSize | None = None, undecided: Undecided | None = None
) -> Orientation:
    """How an image is to be turned.

    Left to itself it follows the size that the annotations state, where only one of both fits. Where that decides
    nothing it follows the other images of its set, and without them the orientation is applied: it is what annotation
    tools and viewers show, and what OpenCV's readers, and with them mmdet's and detectron2's, give.

    Args:
        facts: Of the file.
        exif: What the user asks for.
        size_px: Height and width in the annotations, as far as they state them.
        undecided: What the other images of the set show; ``None`` where they show nothing.
    """
    own = facts.orientation
    if own == UPRIGHT:
        return Orientation(UPRIGHT)
    if exif != "auto":
        return Orientation(own) if exif == "apply" else Orientation(UPRIGHT, is_left=True)
    view = view_of_size(facts, size_px) or undecided
    if view == "stored":
        return Orientation(UPRIGHT, is_left=True)
    return Orientation(own, is_guess=view is None)


def view_of_size(facts: ImageFacts, size_px: StatedSize | None) -> Undecided | None:
    """Which view of an image the size in its annotations is of: ``apply`` for the turned one; ``None`` for either."""
    stated = size_px or (None, None)
    fits_stored, fits_upright = (_fits(stated, size) for size in (facts.stored_size_px, facts.upright_size_px))
    if fits_stored == fits_upright:
        return None
    return "stored" if fits_stored else "apply"


def _fits(stated: StatedSize, size_px: tuple[int, int]) -> bool:
    return all(side is None or side == own for side, own in zip(stated, size_px, strict=True))


def turned(pixels: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Stored pixels (H, W, ...) as EXIF's orientation, 1 to 8, says they are to be seen; contiguous."""
    if orientation in _SIDES_SWAPPED:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def oriented_size(size_px: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Height and width of an image of a stored size, once an orientation is applied."""
    return (size_px[1], size_px[0]) if orientation in _SIDES_SWAPPED else size_px


def reoriented(pixels: npt.NDArray[Any], own: int, orientation: int) -> npt.NDArray[Any]:
    """Pixels that are turned by ``own`` already, turned by ``orientation`` instead."""
    if own == orientation:
        return pixels
    return turned(turned(pixels, _INVERSE.get(own, own)), orientation)
