"""A small classification set: handwritten digits, one folder of images for each class.

The digits (UCI, 1,797 scans of 8 x 8) come with scikit-learn. The split is that of the demo's scenes.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from piip_scale.data.reading.files import write_bytes
from piip_scale.demo.scenes import digit_scans
from piip_scale.errors import DataError

MIN_SIZE_PX = 8
_INK_RANGE = 16.0


def write_digits(folder: Path, *, size_px: int) -> dict[str, int]:
    """Writes ``train/DIGIT/NUMBER.png`` and ``val/DIGIT/NUMBER.png``, one image a scan; the same bytes each time.

    Args:
        folder: Where to write.
        size_px: Side of the square images.

    Returns:
        How many images each split has.

    Raises:
        DataError: The size makes no sense, or the folder cannot be written.
    """
    if size_px < MIN_SIZE_PX:
        raise DataError("size of the digits", value=size_px, rule=f"at least {MIN_SIZE_PX} px")
    counts = {}
    for split in ("train", "val"):
        scans, digits = digit_scans(split)
        for number, (scan, digit) in enumerate(zip(scans, digits, strict=True)):
            grey = cv2.resize(scan.astype(np.float32), (size_px, size_px), interpolation=cv2.INTER_CUBIC)
            pixels = np.clip(np.rint(grey * (255 / _INK_RANGE)), 0, 255).astype(np.uint8)
            png = cv2.imencode(".png", pixels)[1].tobytes()
            write_bytes(folder / split / str(digit) / f"{number:04d}.png", png, durable=False)
        counts[split] = len(digits)
    return counts
