"""One save of one rank: a thread writes its files, and rank 0's commits when all ranks have written theirs."""

from __future__ import annotations

import enum
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from piip_scale.checkpoint.store import CheckpointStore, num_bytes
from piip_scale.errors import CheckpointError
from piip_scale.files import disk_errors
from piip_scale.world import World

# Rank 0 looks so often for the others' marks: a folder's listing costs a shared disk little.
_LOOK_SECONDS = 0.05
LAST_SECONDS = 5.0
"""What an error leaves of a run's save may take so long to end; srun and launch_local kill the ranks soon after."""


class Progress(enum.IntEnum):
    """How far a rank's save is; of several ranks', the largest is that of the whole."""

    DONE = 0
    WRITING = 1
    FAILED = 2


@dataclass(frozen=True)
class SaveFiles:
    """What a rank writes into a checkpoint, by path inside it.

    Attributes:
        tensors: For ``torch.save``.
        texts: As they are.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class SaveJob:
    """Writes in the background what ``files`` hold; no method is collective.

    The thread takes part in no collective: what ranks let each other know, they do by files in the staging folder, and
    the training's own thread asks ``progress``.

    Args:
        store: Where; rank 0 has begun the step's save.
        step: Optimiser steps behind it.
        world: The ranks.
        files: This rank's.

    Attributes:
        error: Why this rank's part failed.
        seconds: From the start to the end of this rank's part: on rank 0, to the checkpoint being visible.
        num_bytes: Size of the whole checkpoint, on rank 0 once it is visible.
    """

    def __init__(self, store: CheckpointStore, step: int, world: World, files: SaveFiles) -> None:
        self.step = step
        self.error: CheckpointError | None = None
        self.seconds, self.num_bytes = 0.0, 0
        self._store, self._world, self._files = store, world, files
        self._cancelled = threading.Event()
        # A daemon: after an error, a process need not wait for gigabytes.
        self._thread = threading.Thread(target=self._run, name=f"save step {step}", daemon=True)
        self._thread.start()

    @property
    def progress(self) -> Progress:
        """This rank's; ``DONE`` on rank 0 once the checkpoint is visible."""
        if self._thread.is_alive():
            return Progress.WRITING
        return Progress.FAILED if self.error else Progress.DONE

    def wait(self, seconds: float) -> bool:
        """Waits for the thread, at most so long; whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def wait_for_all(self, seconds: float) -> bool:
        """Waits for the parts of all ranks, at most so long; whether nothing of the save is under way any more."""
        until_s = time.monotonic() + seconds
        while is_open := not self.wait(_LOOK_SECONDS) or self._store.staging(self.step).exists():
            if time.monotonic() > until_s:
                break
            time.sleep(_LOOK_SECONDS)
        return not is_open

    def cancel(self) -> None:
        """Asks the thread to end at its next write, with no checkpoint made."""
        self._cancelled.set()

    def _run(self) -> None:
        started = time.perf_counter()
        where = f"checkpoint {self._store.staging(self.step)} on rank {self._world.rank}"
        try:
            with disk_errors(CheckpointError, f"write {where}"):
                self._write()
            if self._world.is_main:
                self._commit()
        except CheckpointError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - a thread has nobody above it; the training raises it
            self.error = CheckpointError(f"cannot write {where}: {type(error).__name__}: {error}")
            self.error.__cause__ = error
        self.seconds = time.perf_counter() - started

    def _write(self) -> None:
        folder = self._store.staging(self.step)
        for name, content in self._files.tensors.items():
            _make_folder(folder, name)
            _Output(folder / name, self._cancelled).save(content)
        for name, text in self._files.texts.items():
            _make_folder(folder, name)
            (folder / name).write_text(text, encoding="utf-8")
        self._store.finish_part(self.step, self._world.rank, [*self._files.tensors, *self._files.texts])

    def _commit(self) -> None:
        while self._store.finished_ranks(self.step) < self._world.num_ranks:
            if self._cancelled.wait(_LOOK_SECONDS):
                raise _abandoned()
        self.num_bytes = num_bytes(self._store.commit(self.step))


class _Output:
    """A new file for ``torch.save`` that remembers what stopped a write: torch says only where in its zip file."""

    def __init__(self, path: Path, cancelled: threading.Event) -> None:
        self._path, self._file, self._cancelled = path, path.open("wb"), cancelled
        self._reason: Exception | None = None

    def write(self, data: Any) -> int:
        try:
            if self._cancelled.is_set():
                raise _abandoned()
            return self._file.write(data)
        except (OSError, CheckpointError) as error:
            self._reason = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def save(self, content: object) -> None:
        """Writes the content and closes the file.

        Raises:
            OSError: The disk refuses.
            CheckpointError: The save was cancelled.
        """
        try:
            with self._file:
                torch.save(content, self)  # type: ignore[arg-type]  # needs nothing but these methods
        except (OSError, RuntimeError) as error:
            # At once: until the run ends, others write on that disk.
            self._path.unlink(missing_ok=True)
            raise (self._reason or error) from None


def _abandoned() -> CheckpointError:
    return CheckpointError("the save was abandoned")


def _make_folder(staging: Path, name: str) -> None:
    # Not the staging folder itself: where rank 0's is not seen, the ranks do not share a disk.
    (staging / name).parent.mkdir(exist_ok=True)
