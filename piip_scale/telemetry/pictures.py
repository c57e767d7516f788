"""Pictures of the newest evaluation as files, for who has no TensorBoard at hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from piip_scale.files import atomic_file

PICTURES_FOLDER = "pictures"
"""In an evaluation's folder, where the report looks for it."""
_MOST_LETTERS = 80


def keep_pictures(folder: Path, pictures: Mapping[str, bytes]) -> None:
    """Writes pictures, JPEG files by the samples they show, in place of those that are there.

    Raises:
        OSError: The disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, (key, content) in enumerate(pictures.items(), start=1):
        # Keys may hold what a file's name may not, and be alike without it.
        names.append(f"{number}_{re.sub(r'[^A-Za-z0-9._-]+', '_', key)[-_MOST_LETTERS:]}.jpg")
        with atomic_file(folder / names[-1]) as file:
            file.write(content)
    for path in folder.glob("*.jpg"):
        if path.name not in names:
            path.unlink(missing_ok=True)
