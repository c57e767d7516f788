"""Optimiser state that lived on a disk while it was saved: raw files beside DeepSpeed's, whose own pickles miss it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from piip_scale.checkpoint.dtypes import FLOAT32
from piip_scale.checkpoint.stored_tensor import Storage, StoredTensor
from piip_scale.errors import CheckpointError

SWAPPED = "swapped"
"""Key in our saves' files of optimiser states, where those live on a disk: for each flat tensor that did, its elements
and where beside the file the raw ones of itself and its states are; ``None`` for the others."""

# Written into the checkpoint by us, read from wherever it came: never a way out of its folder.
_STEM = re.compile(r"offloaded_tensors/rank\d{2,6}/[A-Za-z0-9_]+")


def attach_swapped(content: Any, folder: Path) -> None:
    """Puts tensors that were on a disk into the places where a file has empty ones.

    Args:
        content: Of a file of optimiser states, changed in place; of any other file, left as it is.
        folder: The file's.

    Raises:
        CheckpointError: The raw files are not there, or what names them does not name such files.
    """
    for index, swapped in enumerate(content.get(SWAPPED, ())):
        if swapped is None:
            continue
        numel, stem = swapped
        if not (isinstance(stem, str) and _STEM.fullmatch(stem)):
            raise CheckpointError(
                f"{folder}: a file of optimiser state names another", value=stem, rule="offloaded_tensors/rankN/NAME"
            )
        optimizer = content["optimizer_state_dict"]
        optimizer["fp32_flat_groups"][index] = _raw(folder / f"{stem}.tensor.swp", numel)
        states = optimizer["optimizer_state_dict"]["state"].get(index, {})
        for key in [key for key, value in states.items() if isinstance(value, StoredTensor) and value.numel == 0]:
            if not (isinstance(key, str) and key.isidentifier()):
                raise CheckpointError(f"{folder}: a state of the optimiser", value=key, rule="its name is a word")
            states[key] = _raw((folder / stem).with_name(f"{key}-{Path(stem).name}.tensor.swp"), numel)


def _raw(path: Path, numel: int) -> StoredTensor:
    if not path.is_file() or type(numel) is not int or not 0 <= numel * FLOAT32.itemsize <= path.stat().st_size:
        raise CheckpointError(
            f"{path} is not there or too short",
            rule=f"it holds {numel} float32 values of optimiser state",
            fix="take another checkpoint",
        )
    return StoredTensor(Storage(path, path.stat().st_size), FLOAT32, 0, (numel,), (1,))
