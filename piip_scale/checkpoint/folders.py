"""The folder that holds DeepSpeed's files, by what a user names: each trainer puts its own folders around them."""

from __future__ import annotations

import os
from pathlib import Path

from piip_scale.errors import CheckpointError
from piip_scale.files import disk_errors

MODEL_FILES = "*model_states.pt"
OPTIMIZER_FILES = "*optim_states.pt"
_LATEST = "latest"
_TAGS_SHOWN = 4
# Accelerate, Hugging Face's Trainer and Lightning: a folder a step, DeepSpeed's in it, the tag in that.
_MOST_FOLDERS = 2


def find_files(path: Path) -> Path:
    """The folder with DeepSpeed's files: the given one, the tag that its ``latest`` names, or the only one inside.

    Args:
        path: It, a folder of one or two levels above it, or one of its files of model states, or its ``latest``.

    Raises:
        CheckpointError: There is none, or there are several and none of them is the latest.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", fix="give a checkpoint's folder")
    if path.is_file() and path.name == _LATEST:
        path = path.parent
    if path.is_file() and path.match(MODEL_FILES):
        return path.parent
    holders = [path] if _holds(path) else []
    above = [path]
    for _ in range(_MOST_FOLDERS):
        if not holders:
            holders = [tag for folder in above for tag in _tags(folder)]
            above = [inner for folder in above for inner in _folders(folder)]
    if len(holders) != 1:
        raise _not_one(path, holders)
    return holders[0]


def is_alone(path: Path) -> bool:
    """Whether a path is a file that somebody took out of a checkpoint, and gave another name."""
    return path.is_file() and path.name != _LATEST and not path.match(MODEL_FILES)


def _not_one(path: Path, holders: list[Path]) -> CheckpointError:
    shown = ", ".join(str(holder.relative_to(path)) for holder in holders[:_TAGS_SHOWN])
    more = ", ..." if len(holders) > _TAGS_SHOWN else ""
    return CheckpointError(
        f"{path} holds {len(holders) or 'no'} DeepSpeed checkpoints{': ' if holders else ''}{shown}{more}",
        rule=f"its {MODEL_FILES} lie in it or in a folder inside it, and latest names one of several",
        fix=f"give one of them: {holders[-1]}" if holders else "give the folder that DeepSpeed wrote",
    )


def _tags(folder: Path) -> list[Path]:
    """The tags in a folder; only the newest where its ``latest`` names one."""
    tags = [child for child in _folders(folder) if _holds(child)]
    try:
        newest = (folder / _LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return tags
    # Compared, never joined: what a file says is not a path.
    return [tag for tag in tags if tag.name == newest] or tags


def _folders(folder: Path) -> list[Path]:
    with disk_errors(CheckpointError, f"read {folder}"):
        if not folder.is_dir():
            return []
        # The listing says what is a folder: files of a thousand ranks may lie here, and every rank may look.
        with os.scandir(folder) as children:
            return sorted(Path(child.path) for child in children if child.is_dir())


def _holds(folder: Path) -> bool:
    return any(folder.glob(MODEL_FILES))
