"""What a user names to be looked at: files, folders, patterns, lists, and the frames of videos, one at a time."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from piip_scale.data.images import MAX_PIXELS, Image, ImageError, read_photo
from piip_scale.data.orientation import Exif

_IMAGES = (
    *(".avif", ".bmp", ".gif", ".ico", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm"),
    *(".pcx", ".pgm", ".png", ".ppm", ".sgi", ".tga", ".tif", ".tiff", ".webp"),
)
_VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
_STDIN = "-"


@dataclass(frozen=True)
class Reading:
    """How photographs are read.

    Attributes:
        exif: What becomes of an orientation in a file.
        max_pixels: An image of more is refused.
        every: Of a video, one frame in so many.
    """

    exif: Exif = "apply"
    max_pixels: int = MAX_PIXELS
    every: int = 1


@dataclass(frozen=True)
class Photo:
    """An image to be looked at, or why there is none.

    Attributes:
        name: What a user calls it: a path, of a video's frame with its number.
        path: The file it comes from.
        stem: What files made of it are called.
        content: The pixels, a file yet to be read, or what is wrong.
    """

    name: str
    path: Path
    stem: str
    content: Image | Reading | ImageError

    def read(self) -> Image:
        """RGB uint8 (H, W, 3).

        Raises:
            ImageError: It is absent, damaged or too large.
        """
        if isinstance(self.content, ImageError):
            raise self.content
        if isinstance(self.content, Reading):
            return read_photo(self.path, exif=self.content.exif, max_pixels=self.content.max_pixels)
        return self.content


def find_photos(words: Iterable[str], reading: Reading, listed: Iterable[str] = ()) -> Iterator[Photo]:
    """The images that words name, in their order; folders with all below them, by name.

    Whatever cannot be found or opened comes as a photo that cannot be read, in its place.

    Args:
        words: Files, folders, patterns as a shell has them (``**`` too), or ``-`` for ``listed``.
        reading: How they are read.
        listed: More such words, a line each; read when their turn comes.
    """
    for word in words:
        if word == _STDIN:
            yield from find_photos((line.rstrip("\r\n") for line in listed if line.strip()), reading)
            continue
        for path in _files(word):
            yield from _frames(path, reading) if path.suffix.lower() in _VIDEOS else [_file(path, reading)]


def _files(word: str) -> list[Path]:
    """The files of one word; the word itself where there are none."""
    path = Path(word)
    if path.is_dir():
        found = [Path(root, name) for root, _, names in os.walk(path) for name in names if not name.startswith(".")]
        return sorted(file for file in found if file.suffix.lower() in _IMAGES + _VIDEOS) or [path]
    if not path.exists() and glob.has_magic(word):
        return [file for name in sorted(glob.glob(word, recursive=True)) for file in _files(name)] or [path]
    return [path]


def _file(path: Path, reading: Reading) -> Photo:
    if path.is_dir():
        rule = f"images end in {', '.join(_IMAGES)}, videos in {', '.join(_VIDEOS)}"
        return Photo(str(path), path, path.name, ImageError(f"folder {path} holds no images", rule=rule))
    return Photo(str(path), path, path.stem, reading)


def _frames(path: Path, reading: Reading) -> Iterator[Photo]:
    problem = partial(ImageError, f"video {path} cannot be read", fix="check the path, or convert it to MP4 with H.264")
    video = cv2.VideoCapture(str(path)) if path.is_file() else None
    try:
        if video is None or not video.isOpened():
            reason = "it is of no format that OpenCV reads" if video else "there is no such file"
            yield Photo(str(path), path, path.stem, problem(value=reason))
            return
        yield from _decoded(path, video, reading, problem(value="it has no frame that can be decoded"))
    finally:
        if video is not None:
            video.release()


def _decoded(path: Path, video: cv2.VideoCapture, reading: Reading, none: ImageError) -> Iterator[Photo]:
    width, height = (int(video.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if width * height > reading.max_pixels:
        rule = f"at most {reading.max_pixels} pixels are read"
        none = ImageError(f"video {path} is {width} x {height} px", rule=rule, fix="raise --max-pixels")
    number = -1
    while width * height <= reading.max_pixels and video.grab():
        number += 1
        if number % reading.every:
            continue
        is_whole, frame = video.retrieve()
        if is_whole:
            pixels: Image = np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)
            yield Photo(f"{path}#{number}", path, f"{path.stem}_{number:06d}", pixels)
    if number < 0:
        yield Photo(str(path), path, path.stem, none)
