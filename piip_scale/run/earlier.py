"""What earlier launches left in a run's directory: moved aside, never removed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

EARLIER = "earlier"
"""The folder in a run's directory that takes it: one numbered folder a launch."""
_NUMBERED = re.compile(r"\d{4,9}")


def set_aside(run_dir: Path, paths: Iterable[Path]) -> Path | None:
    """Moves files and folders of a run into the next numbered folder of ``earlier``, by their paths in the run.

    Args:
        run_dir: The run's directory.
        paths: Inside it; those that are not there are passed over, and links are moved as links.

    Returns:
        The folder that has them now; ``None`` where nothing was there.

    Raises:
        OSError: The disk refuses.
    """
    present = [path for path in paths if path.is_symlink() or path.exists()]
    if not present:
        return None
    folder = _next_folder(run_dir / EARLIER)
    for path in present:
        target = folder / path.relative_to(run_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, target)
    return folder


def _next_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(name) for name in os.listdir(parent) if _NUMBERED.fullmatch(name)]
    folder = parent / f"{max(taken, default=0) + 1:04d}"
    folder.mkdir()
    return folder
