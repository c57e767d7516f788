"""Weights in several files, as the Hugging Face hub lays them out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from piip_scale.checkpoint.safetensors_writer import Entry, in_file_order
from piip_scale.files import sync_file

INDEX = "model.safetensors.index.json"
_GB = 10**9  # as the hub counts


def split_into_files(entries: Iterable[Entry], max_file_gb: float = math.inf) -> list[list[Entry]]:
    """The tensors of each file, in their order from file to file, and in the files' own order inside.

    Args:
        entries: All tensors.
        max_file_gb: Largest size of a file in GB (10^9 bytes); a larger tensor has a file of its own.
    """
    files: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if files[-1] and held + entry.num_bytes > max_file_gb * _GB:
            files.append([])
            held = 0
        files[-1].append(entry)
        held += entry.num_bytes
    return [in_file_order(file) for file in files]


def file_names(count: int) -> list[str]:
    """What so many files are called."""
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, files: Mapping[str, Iterable[Entry]]) -> None:
    """Writes which file each tensor is in.

    Args:
        folder: Where the files are.
        files: The tensors of each, by its name.

    Raises:
        OSError: The disk refuses.
    """
    names = {entry.name: name for name, entries in files.items() for entry in entries}
    total = sum(entry.num_bytes for entries in files.values() for entry in entries)
    content = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / INDEX).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync_file(folder / INDEX)
