"""Optimiser state that lived on a disk while it was saved: raw files beside DeepSpeed's, whose own pickles miss it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SWAPPED = "swapped"
"""Key in our saves' files of optimiser states, where those live on a disk: for each flat tensor that did, its elements
and where beside the file the raw ones of itself and its states are; ``None`` for the others."""


def attach_swapped(content: Any, folder: Path) -> None:
    """Puts tensors that were on a disk into the places where a file has empty ones; mapped, not read.

    Args:
        content: Of a file of optimiser states, changed in place; of any other file, left as it is.
        folder: The file's.
    """
    for index, swapped in enumerate(content.get(SWAPPED, ())):
        if swapped is None:
            continue
        numel, stem = swapped
        optimizer = content["optimizer_state_dict"]
        optimizer["fp32_flat_groups"][index] = _raw(folder / f"{stem}.tensor.swp", numel)
        states = optimizer["optimizer_state_dict"]["state"].get(index, {})
        for key in [key for key, value in states.items() if torch.is_tensor(value) and value.numel() == 0]:
            states[key] = _raw((folder / stem).with_name(f"{key}-{Path(stem).name}.tensor.swp"), numel)


def _raw(path: Path, numel: int) -> Tensor:
    return torch.from_file(str(path), shared=False, size=numel, dtype=torch.float32)
