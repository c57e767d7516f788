"""Kills a rank at a named moment of a save, from inside: those at which a kill leaves another state of the disk."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from piip_scale.checkpoint import store
from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.host_copy import HostCopies

# By rank 0 alone, and by any rank.
MOMENTS_OF_MAIN = (
    "begun",
    "before the manifest",
    "before the rename",
    "before latest",
    "before pruning",
    "half pruned",
)
MOMENTS_OF_ALL = ("copying", "half written", "written", "marked")


class SaveKiller:
    """Waits for the save of one step, and then for its moment.

    Args:
        moment: One of the above.
        step: The save's.
        rank: Whom it kills; ranks that are forked from this process have it too.
    """

    def __init__(self, moment: str, step: int, rank: int) -> None:
        self._step, self._rank, self._in_save = step, rank, False
        self._before(Checkpointer, "save", lambda _, step: self._note(step))
        places: dict[str, Callable[[], None]] = {
            "begun": lambda: self._after(CheckpointStore, "begin"),
            "copying": lambda: self._before(HostCopies, "copy", self._die),
            "half written": lambda: self._replace(torch, "save", self._save_half),
            "written": lambda: self._before(CheckpointStore, "finish_part", self._die),
            "marked": lambda: self._after(CheckpointStore, "finish_part"),
            "before the manifest": lambda: self._before(store, "_write_manifest", self._die),
            "before the rename": lambda: self._after(store, "_write_manifest"),
            "before latest": lambda: self._before(CheckpointStore, "_tidy", self._die),
            "before pruning": lambda: self._before(CheckpointStore, "_drop", self._die_where_there),
            "half pruned": lambda: self._before(store, "_remove", self._remove_half),
        }
        places[moment]()

    def _note(self, step: int) -> None:
        self._in_save = step == self._step and os.environ.get("RANK") == str(self._rank)

    def _die(self, *_: Any) -> None:
        if self._in_save:
            os.kill(os.getpid(), signal.SIGKILL)

    def _die_where_there(self, _store: CheckpointStore, target) -> None:
        if target.exists():
            self._die()

    def _save_half(self, save: Callable, content: object, file: Any) -> None:
        if not self._in_save:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: whole.getbuffer().nbytes // 2])
        file.flush()
        return self._die()

    def _remove_half(self, path) -> None:
        if self._in_save and path.is_dir() and path.name.startswith(".dropped"):
            next(path.rglob("*.pt")).unlink()
            self._die()

    def _before(self, owner: Any, name: str, action: Callable) -> None:
        def wrapped(original: Callable, *args: Any) -> Any:
            action(*args)
            return original(*args)

        self._replace(owner, name, wrapped)

    def _after(self, owner: Any, name: str) -> None:
        def wrapped(original: Callable, *args: Any) -> Any:
            value = original(*args)
            self._die()
            return value

        self._replace(owner, name, wrapped)

    @staticmethod
    def _replace(owner: Any, name: str, wrapped: Callable) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *args: wrapped(original, *args))
