"""Whether a run ever wrote a checkpoint: one that did and has none left must not start over silently."""

from __future__ import annotations

import mmap
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from piip_scale.run.run_dir import RunDirectory

_OF_CHECKPOINTS = re.compile(r"step_\d{8,}|latest")
_SAVE_LINE = b'"kind": "checkpoint"'


def sign_of_checkpoints(run: RunDirectory) -> str:
    """What in a run's directory shows that it had checkpoints, in a few words; empty where nothing does.

    A run that died before its first save shows none, whatever steps its status has.

    Raises:
        RunError: The status file is not one.
    """
    return _in_folder(run.checkpoints) or _in_status(run) or _in_metrics(run.metrics, run.superseded_metrics)


def _in_folder(folder: Path) -> str:
    if folder.is_symlink() and not folder.exists():
        return f"{folder} is a link to {os.readlink(folder)}, which is not there"
    if folder.exists() and not folder.is_dir():
        return f"{folder} is a file"
    # Neither hidden folders, saves that never became visible, nor what a fresh disk has, as lost+found.
    left = sorted(filter(_OF_CHECKPOINTS.fullmatch, os.listdir(folder))) if folder.is_dir() else []
    return f"{folder} holds {left[-1]}" if left else ""


def _in_status(run: RunDirectory) -> str:
    status = run.status()
    if status is None:
        return ""
    if status.checkpoint_step:
        return f"{run.status_file.name} names the checkpoint of step {status.checkpoint_step}"
    # Both ends save first.
    ended_well = status.state in ("stopped", "done") and status.step > 0
    return f"{run.status_file.name} says {status.state} at step {status.step}" if ended_well else ""


def _in_metrics(*paths: Path) -> str:
    for path in paths:
        # An empty file cannot be mapped, and logs nothing.
        with (
            suppress(FileNotFoundError, ValueError),
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            if content.find(_SAVE_LINE) >= 0:
                return f"{path.name} logs saved checkpoints"
    return ""
