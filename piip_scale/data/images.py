"""The one reader of image files: to RGB pixels, or to the numbers of a label map.

Every file that a user or a set brings is read here, so that limits, errors and orientation are the same when packing,
training, evaluating and predicting. What a file's EXIF data say of its orientation is applied only where the caller
asks for it: packing decides once for each image, the index of a shard keeps the decision.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from piip_scale.data.orientation import (
    UPRIGHT,
    Exif,
    ImageFacts,
    oriented_size,
    reoriented,
    resolve_orientation,
    turned,
)
from piip_scale.errors import DataError
from piip_scale.logging import get_logger

if TYPE_CHECKING:
    import PIL.Image

MAX_PIXELS = 500_000_000
"""An image of more pixels is refused unless a limit above is asked for: at this one it takes 1.5 GB decoded."""

# Pillow runs Ghostscript for EPS, and its readers of rare formats are the least tried: a set brings neither here.
_FORMATS = "AVIF BMP DIB GIF ICO JPEG JPEG2000 MPO PCX PNG PPM SGI TGA TIFF WEBP"

Image = npt.NDArray[np.uint8]
_PHOTO_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_MAP_MODES = frozenset({"1", "L", "P", "I", "I;16", "I;16B", "I;16L"})
# Lossy: the numbers of a map would come back as others.
_LOSSY = frozenset({"JPEG", "MPO"})
_JPEG_MARK, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
# What names EXIF data in formats that are common enough to be worth looking for it: Pillow decodes a whole PNG to ask.
_EXIF_MARKS = {_JPEG_MARK: (b"Exif\0",), b"\x89PNG": (b"eXIf", b"Raw profile type exif", b"Raw profile type APP1")}
_PIXELS_SURVIVE = "extraneous bytes before marker"
# Pillow's limit is a global of its module, and one for all formats.
_PILLOWS_LIMIT = threading.Lock()


class ImageError(DataError):
    """An image file that cannot be read: absent, damaged, of no known format, or too large."""


def read_file(path: Path, what: str = "image") -> bytes:
    """The content of an image file.

    Raises:
        ImageError: It is absent or cannot be read.
    """
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ImageError(f"{what} {path} cannot be read", value=reason, fix="check the path") from None


def image_facts(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Size, orientation and kind of an image, without decoding it.

    EXIF data that cannot be read count as none, and are a ``flaw``.

    Raises:
        ImageError: It is no image that can be read, or has more than ``max_pixels``.
    """
    with _image_errors("image", name, content), _opened(content, name, max_pixels) as (image, notices):
        orientation, flaw = _orientation_of(image) if may_be_turned(content) else (UPRIGHT, "")
        size_px = _stored_size(image, orientation)
        return ImageFacts(image.format or "", image.mode, size_px, orientation, flaw or _first_line(notices))


def may_be_turned(content: bytes) -> bool:
    """Whether an image file may hold an orientation, without reading its header."""
    marks = next((marks for start, marks in _EXIF_MARKS.items() if content.startswith(start)), (b"",))
    return any(mark in content for mark in marks)


def decode_image(
    content: bytes,
    name: str,
    *,
    orientation: int = UPRIGHT,
    max_pixels: int = MAX_PIXELS,
    flaws: list[str] | None = None,
) -> Image:
    """Decodes an image of any usual format to RGB, uint8 (H, W, 3); of an animated one the first frame.

    Args:
        content: The file.
        name: What errors call it.
        orientation: EXIF's number of how to turn the stored pixels; what the file says itself is not looked at.
        max_pixels: Refuse an image of more, before it is decoded.
        flaws: Is given what was wrong with the file, where its pixels could be read all the same.

    Raises:
        ImageError: It is truncated, damaged, too large, not of 8 bits, or not an image.
    """
    flaws = [] if flaws is None else flaws
    with _image_errors("image", name, content, rule="it must be a whole image of 8 bits a channel"):
        if content[:2] == _JPEG_MARK:
            return turned(_decode_jpeg(content, name, max_pixels, flaws), orientation)
        return _decode_other(content, name, orientation, max_pixels, flaws)


def read_photo(path: Path, *, exif: Exif = "apply", max_pixels: int = MAX_PIXELS, quiet: bool = False) -> Image:
    """A file's pixels, RGB uint8 (H, W, 3), upright unless they are wanted as ``stored``.

    Flaws are logged, unless ``quiet``.

    Raises:
        ImageError: The file is absent, or as in ``decode_image``.
    """
    content, name = read_file(path), str(path)
    facts = image_facts(content, name, max_pixels=max_pixels)
    orientation = resolve_orientation(facts, exif)
    flaws = [facts.flaw] if facts.flaw else []
    pixels = decode_image(content, name, orientation=orientation.number, max_pixels=max_pixels, flaws=flaws)
    if quiet:
        return pixels
    for flaw in dict.fromkeys(flaws):
        get_logger(__name__).warning("image %s is read in spite of a flaw: %s", name, flaw)
    if facts.orientation != UPRIGHT:
        turn = "not turned" if orientation.is_left else "turned"
        get_logger(__name__).info("image %s is %s as its EXIF data say (%d)", name, turn, facts.orientation)
    return pixels


def decode_map(
    content: bytes, name: str, *, orientation: int = UPRIGHT, max_pixels: int = MAX_PIXELS
) -> npt.NDArray[Any]:
    """The numbers of a label map as its file holds them: of few bits not scaled, of a palette the indices.

    Args:
        content: The file.
        name: What errors call it.
        orientation: As in ``decode_image``.
        max_pixels: As in ``decode_image``.

    Returns:
        uint8 (H, W); uint16 or int32 where the file has more than 8 bits.

    Raises:
        ImageError: It is damaged, too large, of several channels, or compressed with losses.
    """
    rule = "it must be a whole image of one channel of whole numbers, or with a palette; PNG is"
    with (
        _image_errors("label map of", name, content, rule=rule),
        _opened(content, name, max_pixels) as (image, _),
    ):
        if image.format in _LOSSY:
            raise ValueError(f"it is compressed as {image.format}, which changes its numbers")
        if image.mode not in _MAP_MODES:
            raise ValueError(f"its pixels are of mode {image.mode}")
        own = _loaded_orientation(image)
        packing = _bit_packing(image)
        return reoriented(_unscaled(np.asarray(image), packing), own, orientation)


def _decode_jpeg(content: bytes, name: str, max_pixels: int, flaws: list[str]) -> Image:
    import simplejpeg

    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(content, strict=False)
    # Of a damaged header it names a number of its own, and no reason.
    except (ValueError, KeyError):
        raise ValueError("it is truncated, or its header is damaged") from None
    _check_pixels(height, width, name, max_pixels)
    try:
        return np.asarray(simplejpeg.decode_jpeg(content, "RGB"))
    except ValueError as error:
        return _decode_flawed_jpeg(content, str(error), flaws)


def _decode_flawed_jpeg(content: bytes, reason: str, flaws: list[str]) -> Image:
    """Decodes a JPEG whose pixels are all there in spite of what the decoder complains of; raises for others."""
    import simplejpeg

    if content.rfind(_JPEG_END, -16) < 0:
        # With an end mark a file that lacks nothing else decodes; one that is cut off still does not with one.
        content, reason = content + _JPEG_END, "it has no end mark"
        with contextlib.suppress(ValueError):
            pixels = np.asarray(simplejpeg.decode_jpeg(content, "RGB"))
            flaws.append(reason)
            return pixels
        reason = "it is truncated"
    elif _PIXELS_SURVIVE in reason:
        flaws.append(_one_line(reason))
        return np.asarray(simplejpeg.decode_jpeg(content, "RGB", strict=False))
    raise ValueError(reason)


def _decode_other(content: bytes, name: str, orientation: int, max_pixels: int, flaws: list[str]) -> Image:
    with _opened(content, name, max_pixels) as (image, notices):
        _check_mode(image)
        own = _loaded_orientation(image)
        pixels = reoriented(_rgb(image), own, orientation)
        flaws.extend(filter(None, [_first_line(notices)]))
        return pixels


def photo_of(image: PIL.Image.Image, max_pixels: int = MAX_PIXELS) -> Image:
    """An image of Pillow's as RGB uint8 (H, W, 3), turned upright as its EXIF data say.

    Raises:
        ImageError: It has more pixels than that, or values of more than 8 bits, which RGB would cut off.
    """
    import PIL.ImageOps

    _check_pixels(image.height, image.width, "image", max_pixels)
    try:
        _check_mode(image)
    except ValueError as error:
        raise ImageError("image", value=str(error), rule="8 bits a channel") from None
    return _rgb(PIL.ImageOps.exif_transpose(image))


def _check_mode(image: PIL.Image.Image) -> None:
    if image.mode not in _PHOTO_MODES:
        raise ValueError(f"its pixels are of mode {image.mode}, not 8-bit")


def _rgb(image: PIL.Image.Image) -> Image:
    # Pillow warns of palettes with alpha that become RGB at once; the colours are the same.
    opaque = image.convert("RGBA") if isinstance(image.info.get("transparency"), bytes) else image
    return np.asarray(opaque.convert("RGB"))


@contextlib.contextmanager
def _opened(
    content: bytes, name: str, max_pixels: int
) -> Iterator[tuple[PIL.Image.Image, list[warnings.WarningMessage]]]:
    """An image of which only the header was read, and what Pillow warns of until it is closed."""
    import PIL.Image

    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        with _PILLOWS_LIMIT:
            pillows, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
            try:
                image = PIL.Image.open(io.BytesIO(content), formats=_formats())
            finally:
                PIL.Image.MAX_IMAGE_PIXELS = pillows
        with image:
            _check_pixels(image.height, image.width, name, max_pixels)
            yield image, notices


@cache
def _formats() -> list[str]:
    """Those of ``_FORMATS`` that this Pillow was built with."""
    import PIL.Image

    # It knows only the commonest until it is asked to.
    PIL.Image.init()
    return [name for name in _FORMATS.split() if name in PIL.Image.OPEN]


@contextlib.contextmanager
def _image_errors(what: str, name: str, content: bytes, *, rule: str = "") -> Iterator[None]:
    import PIL

    try:
        yield
    except DataError:
        raise
    except PIL.UnidentifiedImageError:
        reason = f"{len(content)} bytes in no format that is read here"
    except MemoryError:
        reason = "it needs more memory than there is"
    # Readers of damaged files raise errors of a dozen kinds, and of none that they have in common.
    except Exception as error:  # noqa: BLE001
        reason = _one_line(str(error)) or type(error).__name__
    else:
        return
    raise ImageError(
        f"{what} {name} cannot be decoded", value=reason, rule=rule, fix="replace the file, or remove its entry"
    ) from None


def _check_pixels(height: int, width: int, name: str, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"it is {width} x {height} px")
    if height * width > max_pixels:
        raise ImageError(
            f"image {name} is {width} x {height} px",
            rule=f"at most {max_pixels} pixels are read, since small files can be made to fill any memory",
            fix=f"if it is what you want, raise --max-pixels (data.max_pixels) to {height * width}",
        )


def _orientation_of(image: PIL.Image.Image) -> tuple[int, str]:
    """EXIF's number, and what was wrong with it."""
    import PIL.ExifTags

    try:
        number = image.getexif().get(PIL.ExifTags.Base.Orientation, UPRIGHT)
    # As with pixels: Pillow's reader of damaged EXIF data raises errors of any kind.
    except Exception as error:  # noqa: BLE001
        return UPRIGHT, f"its EXIF data cannot be read ({_one_line(str(error))})"
    if isinstance(number, int) and UPRIGHT <= number <= 8:
        return number, ""
    # 0 stands for "unknown" in many files.
    return UPRIGHT, "" if number == 0 else f"its EXIF data name an orientation {number!r}"


def _loaded_orientation(image: PIL.Image.Image) -> int:
    """How Pillow turns an image's pixels by itself when it loads them: it does so for TIFF alone."""
    return _orientation_of(image)[0] if image.format == "TIFF" else UPRIGHT


def _stored_size(image: PIL.Image.Image, orientation: int) -> tuple[int, int]:
    size_px = image.height, image.width
    return oriented_size(size_px, orientation) if image.format == "TIFF" else size_px


def _bit_packing(image: PIL.Image.Image) -> tuple[str, int]:
    """Pillow's name for how pixels are packed, and the largest number that the header allows (0: as by the name).

    Only known before they are loaded.
    """
    tiles: list[Any] = getattr(image, "tile", [])
    if not tiles:
        return image.mode, 0
    codec, args = tiles[0].codec_name, tiles[0].args
    if not isinstance(args, tuple):
        return str(args), 0
    return str(args[0]), int(args[1]) if codec in ("ppm", "ppm_plain") else 0


def _unscaled(values: npt.NDArray[Any], packing: tuple[str, int]) -> npt.NDArray[Any]:
    """Undoes what Pillow does to numbers of few bits, which are shades of grey to it: spreads and inverts them."""
    name, largest = packing
    if values.dtype == bool:
        values = values.astype(np.uint8)
        return 1 - values if name.endswith("I") else values
    if largest:
        spread = 255 if values.dtype == np.uint8 else 65535
        return np.rint(values.astype(np.float64) * largest / spread).astype(values.dtype)
    match = re.fullmatch(r"L(?:;([24]?)(I?)R?)?", name)
    if match is None:
        return values
    values = 255 - values if match[2] else values
    return values // {"2": 85, "4": 17}.get(match[1] or "", 1)


def _first_line(notices: list[warnings.WarningMessage]) -> str:
    return _one_line(str(notices[0].message)) if notices else ""


def _one_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
