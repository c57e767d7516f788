"""``manifest.json``: every file of a checkpoint with its size and a checksum, and what a checkpoint says by it."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from piip_scale.errors import CheckpointError
from piip_scale.files import sync_file, write_text_atomically

MANIFEST = "manifest.json"
FORMAT_VERSION = 1

_PART = re.compile(r"\.rank_\d{5,}\.json")
_CHECKSUM = re.compile(r"[0-9a-f]{8}")
_MANY = 1 << 62

# A checksum covers files of up to 64 MiB whole; of larger ones that many MiB, evenly spaced with both ends among
# them, so that committing 100 GB costs a second and not minutes.
_BLOCK_BYTES = 1 << 20
_MAX_BLOCKS = 64


def write_part(staging: Path, rank: int, names: Iterable[str]) -> None:
    """Lists a rank's files, closed and inside ``staging``, once they are on its disk, in a mark of its own.

    Raises:
        OSError: The disk refuses.
    """
    entries = {name: _entry(staging / name) for name in names}
    write_text_atomically(staging / f".rank_{rank:05d}.json", json.dumps(entries))


def count_parts(staging: Path) -> int:
    """How many ranks have left their mark.

    Raises:
        OSError: The disk refuses.
    """
    return sum(_PART.fullmatch(name) is not None for name in os.listdir(staging))


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


def write_manifest(staging: Path, step: int) -> None:
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
        files = content["files"].items()
        wellformed = _is_count(content["step"]) and all(_is_entry(name, entry) for name, entry in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}", fix="take another checkpoint") from error
    if version != FORMAT_VERSION or not wellformed:
        raise CheckpointError(
            f"{path} is of another format",
            value=version,
            rule=f"this version reads format {FORMAT_VERSION}",
            fix="read it with the version of piip-scale that wrote it",
        )
    return content


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MANY


def _is_entry(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether a file's line in a manifest is one of ours; its name never leads out of the checkpoint."""
    is_inside = name.isprintable() and not {"", ".", ".."} & set(name.split("/"))
    return is_inside and _is_count(entry["bytes"]) and _CHECKSUM.fullmatch(entry["crc32"]) is not None


def whole_files(checkpoint: Path) -> dict[str, dict[str, Any]]:
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


def fault_of(checkpoint: Path, step: int | None = None) -> str | None:
    """What is wrong with a checkpoint's manifest or sizes, or with its name for a ``step``; ``None`` for nothing."""
    try:
        whole_files(checkpoint)
        held = read_step(checkpoint)
    except CheckpointError as error:
        return error.line
    if step not in (None, held):
        # Else a run would go on from step 120 and find its old "step 999" the newest for ever.
        return f"{checkpoint} holds step {held}, which is not its name"
    return None
