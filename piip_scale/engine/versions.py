"""Which versions wrote a checkpoint, and whether these can go on from it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from piip_scale import __version__
from piip_scale.errors import CheckpointError
from piip_scale.logging import get_logger

STATE_FORMAT = 2
"""Of a checkpoint's description; format 1 did not say its number."""

FROM_WEIGHTS = (
    "piip-scale convert RUN OUT.safetensors, then piip-scale train CONFIG --run-dir NEW --set "
    "model.pretrained=OUT.safetensors"
)
"""What to do with the weights of a run that cannot be resumed."""

_OURS = "piip-scale"


def versions() -> dict[str, str]:
    """Of the libraries that decide what a checkpoint holds and how training goes on from it."""
    return {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")} | {_OURS: __version__}


def check_format(path: Path, content: Mapping[str, Any]) -> None:
    """Refuses a description that another version of this package wrote in another format.

    Args:
        path: Its file.
        content: What is in it.

    Raises:
        CheckpointError: Names both formats and the version that wrote it.
    """
    found = content.get("format", 1)
    if found != STATE_FORMAT:
        writer = content.get("versions", {}).get(_OURS, "of unknown version")
        raise CheckpointError(
            f"{path} is of format {found}, written by {_OURS} {writer}",
            rule=f"{_OURS} {__version__} reads format {STATE_FORMAT}",
            fix=f"resume with the version that wrote it, or train a new run from its weights: {FROM_WEIGHTS}",
        )


def warn_of_other_versions(path: Path, saved: Mapping[str, str]) -> None:
    """Warns where other versions wrote a checkpoint, with both of each: the continuation may differ in last digits.

    Args:
        path: The checkpoint.
        saved: The versions that wrote it.
    """
    differing = [
        f"{name} {saved.get(name)} (here {here})" for name, here in versions().items() if saved.get(name) != here
    ]
    if differing:
        get_logger(__name__).warning(
            "checkpoint %s was written with %s: its continuation may differ in last digits", path, ", ".join(differing)
        )
