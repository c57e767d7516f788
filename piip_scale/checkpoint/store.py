"""A folder of checkpoints in which each is whole or invisible.

A save is written into a hidden folder, and a rename makes it visible after everything in it is on the disk.
``manifest.json`` inside lists every file with its size and a checksum, so a reader can tell a whole checkpoint
from a damaged one without opening a single tensor.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from piip_scale.errors import CheckpointError
from piip_scale.files import disk_errors, sync_file, write_text_atomically
from piip_scale.logging import get_logger

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT_VERSION = 1

_COMMITTED = re.compile(r"step_(\d{8,})")
_PART = re.compile(r"\.rank_\d{5,}\.json")
_HIDDEN = re.compile(r"\.(saving|dropped)_\d{8,}|\.latest\.\d+\.part")

# A checksum covers files of up to 64 MiB whole; of larger ones that many MiB, evenly spaced with both ends among
# them, so that committing 100 GB costs a second and not minutes.
_BLOCK_BYTES = 1 << 20
_MAX_BLOCKS = 64


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
        if target.exists() and _fault(target) is None:
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
        staging = self.staging(step)
        entries = {name: _entry(staging / name) for name in names}
        write_text_atomically(staging / f".rank_{rank:05d}.json", json.dumps(entries))

    def finished_ranks(self, step: int) -> int:
        """How many ranks have finished their part of a save.

        Raises:
            OSError: The disk refuses.
        """
        return sum(_PART.fullmatch(name) is not None for name in os.listdir(self.staging(step)))

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

    def steps(self) -> list[int]:
        """Steps of the visible checkpoints, damaged ones included, in rising order."""
        if not self.folder.is_dir():
            return []
        matches = (_COMMITTED.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> Path | None:
        """The newest checkpoint whose files are all there with their sizes; ``None`` where there is none.

        Skips, with a warning that says why, newer ones that are damaged.
        """
        for step in reversed(self.steps()):
            fault = _fault(self.path(step))
            if fault is None:
                return self.path(step)
            get_logger(__name__).warning("skipping a damaged checkpoint: %s", fault)
        return None

    def validate(self, path: Path) -> None:
        """Checks every file of a checkpoint against the manifest, with its checksum.

        Raises:
            CheckpointError: Names the file and what is wrong with it.
        """
        path = Path(path)
        files = _whole_files(path)
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
        whole = [step for step in self.steps() if _fault(self.path(step)) is None]
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


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint a user means by ``path``.

    Args:
        path: A checkpoint, or a folder of them, or that folder's ``latest``, or a run directory with ``checkpoints``.

    Raises:
        CheckpointError: There is no whole checkpoint there.
    """
    path = Path(path)
    if path.is_dir() and _COMMITTED.fullmatch(path.resolve().name):
        _whole_files(path)
        return path
    folder = path.parent if path.name == LATEST else path
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    newest = CheckpointStore(folder, keep=1).latest()
    if newest is None:
        raise CheckpointError(
            f"no whole checkpoint in {folder}",
            rule="a checkpoint is a folder step_00000120 with a manifest.json",
            fix="give such a folder, or the checkpoints folder of a run",
        )
    return newest


def read_step(checkpoint: Path) -> int:
    """The optimiser step at which a committed checkpoint was saved.

    Raises:
        CheckpointError: The manifest is missing or broken.
    """
    return int(_read_manifest(checkpoint)["step"])


def num_bytes(checkpoint: Path) -> int:
    """Size of all files of a committed checkpoint but its manifest.

    Raises:
        CheckpointError: The manifest is missing or broken.
    """
    return sum(entry["bytes"] for entry in _read_manifest(checkpoint)["files"].values())


def checksum(path: Path) -> str:
    """CRC-32 of a file as hex; of a file above 64 MiB, that of 64 evenly spaced blocks of 1 MiB.

    Raises:
        OSError: The file cannot be read.
    """
    size = path.stat().st_size
    num_blocks = -(-size // _BLOCK_BYTES)
    crc = 0
    with path.open("rb") as file:
        for index in range(min(num_blocks, _MAX_BLOCKS)):
            if num_blocks > _MAX_BLOCKS:
                file.seek(index * (size - _BLOCK_BYTES) // (_MAX_BLOCKS - 1))
            crc = zlib.crc32(file.read(_BLOCK_BYTES), crc)
    return f"{crc:08x}"


def _write_manifest(staging: Path, step: int) -> None:
    """Lists everything in ``staging``: finished parts as their ranks found them, the rest here."""
    files = _take_parts(staging)
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    if not paths:
        raise CheckpointError(f"nothing was written into {staging}", fix="write the checkpoint's files before commit")
    for path in paths:
        name = str(path.relative_to(staging))
        files[name] = files.get(name) or _entry(path)
    for inner in (path for path in staging.rglob("*") if path.is_dir()):
        sync_file(inner)
    content = {"format": FORMAT_VERSION, "step": step, "files": files}
    write_text_atomically(staging / MANIFEST, json.dumps(content, indent=1))


def _take_parts(staging: Path) -> dict[str, dict[str, Any]]:
    """The entries of all finished parts; their marks are removed."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in staging.iterdir() if _PART.fullmatch(path.name)):
        files |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    _check_sizes(staging, files, fix="let all ranks write to one disk that they share")
    return files


def _entry(path: Path) -> dict[str, Any]:
    """Size and checksum of a file that is on the disk."""
    sync_file(path)
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", rule="a whole checkpoint has one", fix="take another checkpoint")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
        wellformed = isinstance(content["step"], int) and all(
            isinstance(entry["bytes"], int) and isinstance(entry["crc32"], str) for entry in content["files"].values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}", fix="take another checkpoint") from error
    if version != FORMAT_VERSION or not wellformed:
        raise CheckpointError(
            f"{path} is of another format",
            value=version,
            rule=f"this version reads format {FORMAT_VERSION}",
            fix="read it with the version of piip-scale that wrote it",
        )
    return content


def _whole_files(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entries by relative path, after a look at each file's size."""
    files: dict[str, dict[str, Any]] = _read_manifest(checkpoint)["files"]
    _check_sizes(checkpoint, files, fix="take another checkpoint")
    return files


def _check_sizes(folder: Path, files: dict[str, dict[str, Any]], fix: str) -> None:
    for name, entry in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(f"{path} {found}", rule=f"it was saved with {entry['bytes']} bytes", fix=fix)


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's manifest or sizes, ``None`` for nothing."""
    try:
        _whole_files(checkpoint)
    except CheckpointError as error:
        return error.line
    return None


def _remove(path: Path) -> None:
    """Removes a file or a folder that may not be there; a reader that still has it open keeps its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
