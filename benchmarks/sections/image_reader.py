"""What the one reader of images costs over the decoder that it calls: its limit, its errors, its flaws."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
import simplejpeg

from piip_scale.data.images import Image, decode_image
from sections.record import table

_ROUNDS, _COPIES = 200, 4
# Height, width and quality.
_FILES = {"64 x 64": (64, 64, 75), "640 x 480": (480, 640, 75), "640 x 480, quality 95": (480, 640, 95)}


def section() -> str:
    """The table of some JPEG files."""
    rows = []
    for name, (height, width, quality) in _FILES.items():
        files = [simplejpeg.encode_jpeg(_photo(height, width, seed), quality=quality) for seed in range(_COPIES)]
        decoder, reader = (sum(least) / _COPIES * 1e6 for least in _least_seconds(files))
        cells = [f"{decoder:.0f}", f"{reader:.0f}", f"{reader - decoder:.0f}", f"**{reader / decoder:.3f}**"]
        rows.append([f"{name}, {sum(map(len, files)) / _COPIES / 1024:.0f} KiB", *cells])
    head = ["", "simplejpeg, us", "`decode_image`, us", "more, us", "ratio"]
    return (
        f"Microseconds of CPU time an image, RGB, one thread: the least of {_ROUNDS} rounds for each of {_COPIES} "
        "files, both in turn, since other work on the machine adds to some rounds and takes from none.\n\n"
        f"{table(head, rows)}"
    )


def _photo(height: int, width: int, seed: int) -> Image:
    """Smooth shapes with grain, as photographs have."""
    random = np.random.default_rng(seed)
    coarse = cv2.resize(random.integers(0, 255, (12, 16, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    grain = random.integers(-8, 9, coarse.shape)
    photo: Image = np.clip(coarse.astype(np.int16) + grain, 0, 255).astype(np.uint8)
    return photo


def _least_seconds(files: list[bytes]) -> tuple[list[float], list[float]]:
    decoder, reader = [float("inf")] * len(files), [float("inf")] * len(files)
    for _ in range(_ROUNDS):
        for number, content in enumerate(files):
            decoder[number] = min(decoder[number], _seconds(partial(simplejpeg.decode_jpeg, content, "RGB")))
            reader[number] = min(reader[number], _seconds(partial(decode_image, content, "photo")))
    return decoder, reader


def _seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start
