"""A folder of checkpoints in which each is whole or invisible.

A save is written into a hidden folder, and a rename makes it visible after everything in it is on the disk.
``manifest.json`` inside lists every file with its size and a checksum, so a reader can tell a whole checkpoint
from a damaged one without opening a single tensor.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from piip_scale.checkpoint.manifest import (
    MANIFEST,
    checksum,
    count_parts,
    fault_of,
    num_bytes,
    read_step,
    whole_files,
    write_part,
)
from piip_scale.checkpoint.manifest import write_manifest as _write_manifest
from piip_scale.errors import CheckpointError
from piip_scale.files import disk_errors, sync_file, write_text_atomically
from piip_scale.logging import get_logger

__all__ = [
    "LATEST",
    "MANIFEST",
    "CheckpointStore",
    "checksum",
    "find_checkpoint",
    "num_bytes",
    "read_step",
    "resolve_checkpoint",
]

LATEST = "latest"

_COMMITTED = re.compile(r"step_(\d{8,})")
_HIDDEN = re.compile(r"\.(saving|dropped)_\d{8,}|\.latest\.\d+\.part")


class CheckpointStore:
    """The checkpoints of one run; no method is collective, and only the main rank may call those that write.

    Saving on many ranks: main ``begin``s, a barrier, every rank writes into ``staging(step)`` and calls
    ``finish_part``, and main ``commit``s as soon as ``finished_ranks`` are all. A process may die anywhere in between.

    Args:
        folder: Holds the checkpoints and nothing else; made by the first ``begin``.
        keep: How many of the newest checkpoints stay.
        milestone_every: Checkpoints of steps that it divides stay whatever their age; 0 for none.
    """

    def __init__(self, folder: Path, keep: int, milestone_every: int = 0) -> None:
        self.folder, self.keep, self.milestone_every = Path(folder), keep, milestone_every

    def staging(self, step: int) -> Path:
        """The hidden folder that ``begin(step)`` makes; any rank may ask."""
        return self.folder / f".saving_{step:08d}"

    def path(self, step: int) -> Path:
        """Where a step's checkpoint is, if there is one."""
        return self.folder / f"step_{step:08d}"

    def begin(self, step: int) -> Path:
        """Makes a fresh, hidden folder for the files of this step's checkpoint. Main rank only.

        Raises:
            CheckpointError: The step already has a whole checkpoint, or the disk refuses.
        """
        target, staging = self.path(step), self.staging(step)
        if target.exists() and fault_of(target) is None:
            raise CheckpointError(
                f"step {step} already has a checkpoint: {target}",
                rule="a checkpoint is written once",
                fix="resume from it, or remove it",
            )
        with disk_errors(CheckpointError, f"begin a checkpoint in {self.folder}"):
            self._drop(target)
            _remove(staging)
            staging.mkdir(parents=True)
        return staging

    def finish_part(self, step: int, rank: int, names: Iterable[str]) -> None:
        """Waits until a rank's files of a save are on its disk, and leaves a mark that they are. Any rank.

        Args:
            step: The save's.
            rank: Whose files.
            names: Their paths inside ``staging(step)``; closed.

        Raises:
            OSError: The disk refuses.
        """
        write_part(self.staging(step), rank, names)

    def finished_ranks(self, step: int) -> int:
        """How many ranks have finished their part of a save.

        Raises:
            OSError: The disk refuses.
        """
        return count_parts(self.staging(step))

    def commit(self, step: int) -> Path:
        """Makes the checkpoint visible, points ``latest`` at it and prunes. Main rank only.

        Call it when every rank has written its last: files are listed here, once. Those in no finished part count too.

        Returns:
            The checkpoint's folder, ``step_00000120`` for step 120.

        Raises:
            CheckpointError: Nothing was written, or the disk refuses; no part of the checkpoint is visible then, and
                the space it took is freed.
        """
        staging, target = self.staging(step), self.path(step)
        try:
            with disk_errors(CheckpointError, f"save checkpoint {target}"):
                _write_manifest(staging, step)
                os.rename(staging, target)
                sync_file(self.folder)
        except CheckpointError:
            self.abandon(step)
            raise
        self._tidy()
        return target

    def abandon(self, step: int) -> None:
        """Removes what was written of a save that failed; on a disk that refuses, leaves it to ``clean``."""
        shutil.rmtree(self.staging(step), ignore_errors=True)

    def is_saving(self) -> bool:
        """Whether a save has begun and is not visible yet, on whichever ranks it is still written. Any rank."""
        return any(self.folder.glob(".saving_*"))

    def steps(self) -> list[int]:
        """Steps of the visible checkpoints, damaged ones included, in rising order."""
        if not self.folder.is_dir():
            return []
        with disk_errors(CheckpointError, f"read {self.folder}"):
            matches = [_COMMITTED.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> Path | None:
        """The newest checkpoint whose files are all there with their sizes; ``None`` where there is none.

        Skips, with a warning that says why, newer ones that are damaged.
        """
        for step in reversed(self.steps()):
            fault = fault_of(self.path(step), step)
            if fault is None:
                return self.path(step)
            get_logger(__name__).warning("skipping a damaged checkpoint: %s", fault)
        return self._newest_renamed()

    def _newest_renamed(self) -> Path | None:
        """The newest whole checkpoint that somebody gave another name, which its manifest knows of."""
        found = {read_step(path): path for path in self._with_manifest() if fault_of(path) is None}
        if not found:
            return None
        newest = found[max(found)]
        get_logger(__name__).warning(
            "%s was renamed: by its manifest it is the checkpoint of step %d", newest, max(found)
        )
        return newest

    def _with_manifest(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if path.name[0] != "." and (path / MANIFEST).is_file()]

    def files_of(self, path: Path) -> dict[str, dict[str, Any]]:
        """What the manifest says of each file, by its path in a checkpoint whose files have their sizes.

        Raises:
            CheckpointError: It is damaged.
        """
        return whole_files(path)

    def validate(self, path: Path) -> None:
        """Checks every file of a checkpoint against the manifest, with its checksum.

        Raises:
            CheckpointError: Names the file and what is wrong with it.
        """
        path = Path(path)
        self.validate_files(path, whole_files(path))

    def validate_files(self, path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Checks some files of a checkpoint as ``validate`` does; any rank.

        Args:
            path: The checkpoint.
            files: Of ``files_of``, those to check.

        Raises:
            CheckpointError: Names the file and what is wrong with it.
        """
        for name, entry in files.items():
            with disk_errors(CheckpointError, f"read {path / name}"):
                found = checksum(path / name)
            if found != entry["crc32"]:
                raise CheckpointError(
                    f"{path / name} was changed after it was saved: checksum {found}",
                    rule=f"the manifest says {entry['crc32']}",
                    fix="take an older checkpoint, or remove this one to resume from an older",
                )

    def check_writable(self) -> None:
        """Makes the folder, and a file in it for a moment: better refused now than at the first save. Main rank only.

        Raises:
            CheckpointError: It cannot take checkpoints.
        """
        probe = self.folder / f".probe.{os.getpid()}"
        with disk_errors(CheckpointError, f"save checkpoints in {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()

    def clean(self) -> None:
        """Removes what killed saves and prunings left behind. Main rank only, while nobody saves.

        Raises:
            CheckpointError: The disk refuses.
        """
        if not self.folder.is_dir():
            return
        with disk_errors(CheckpointError, f"clean {self.folder}"):
            for path in self.folder.iterdir():
                if _HIDDEN.fullmatch(path.name):
                    _remove(path)

    def _tidy(self) -> None:
        """Updates ``latest``, which is for people, and prunes, just after a checkpoint was saved.

        An error about either is worth less than the checkpoint, which ``latest()`` finds without the file.
        """
        whole = [step for step in self.steps() if fault_of(self.path(step)) is None]
        try:
            write_text_atomically(self.folder / LATEST, f"{self.path(whole[-1]).name}\n")
            for step in self.steps():
                if step < whole[-self.keep :][0] and not self._is_milestone(step):
                    self._drop(self.path(step))
        except OSError as error:
            get_logger(__name__).warning("cannot tidy %s: %s", self.folder, error)

    def _is_milestone(self, step: int) -> bool:
        return self.milestone_every > 0 and step % self.milestone_every == 0

    def _drop(self, target: Path) -> None:
        """Hides a checkpoint first, so that no half-deleted one is ever visible."""
        if target.exists():
            hidden = self.folder / f".dropped_{target.name.removeprefix('step_')}"
            _remove(hidden)
            os.rename(target, hidden)
            _remove(hidden)


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint of ours that a user means by ``path``; ``None`` where there is no sign of one.

    Args:
        path: As of ``resolve_checkpoint``.

    Raises:
        CheckpointError: There are only damaged ones.
    """
    path = Path(path)
    if path.is_dir():
        # Under whichever name: what makes a folder a checkpoint is its manifest.
        if (path / MANIFEST).is_file() or _COMMITTED.fullmatch(path.resolve().name):
            whole_files(path)
            return path
        if (path.parent / MANIFEST).is_file() and any(path.glob("*model_states.pt")):
            return find_checkpoint(path.parent)
    folder = path.parent if path.name == LATEST and not path.is_dir() else path
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    store = CheckpointStore(folder, keep=1)
    newest = store.latest()
    if newest is None and store.steps():
        raise _none_whole(folder)
    return newest


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint a user means by ``path``.

    Args:
        path: A checkpoint under any name, or a folder of them, or that folder's ``latest``, or a run directory with
            ``checkpoints``.

    Raises:
        CheckpointError: There is no whole checkpoint there.
    """
    newest = find_checkpoint(path)
    if newest is None:
        raise _none_whole(path)
    return newest


def _none_whole(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"no whole checkpoint in {folder}",
        rule="a checkpoint is a folder step_00000120 with a manifest.json",
        fix="give such a folder, or the checkpoints folder of a run",
    )


def _remove(path: Path) -> None:
    """Removes a file or a folder that may not be there; a reader that still has it open keeps its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
