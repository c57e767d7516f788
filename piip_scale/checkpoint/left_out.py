"""Frozen weights that a checkpoint leaves to a file of pretrained weights: its record, and tensors in their place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piip_scale.checkpoint.dtypes import of_torch
from piip_scale.checkpoint.origin import STATE_FILE
from piip_scale.checkpoint.stored import StoredFile, Weight, whole_weight
from piip_scale.checkpoint.stored_tensor import Storage, StoredTensor
from piip_scale.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Given = Callable[[Mapping[str, Any]], Mapping[str, "Tensor"]]
"""From a checkpoint's record to what it left out, by the model's names."""

LEFT_OUT = "left_out"
"""Key in a checkpoint's description; what lies under it is made and read by ``models.frozen_files``."""


def left_out_of(checkpoint: Path) -> Mapping[str, Any]:
    """The record of what a checkpoint leaves out; empty where it is whole, or none of ours.

    Raises:
        CheckpointError: It cannot be read.
    """
    path = checkpoint / STATE_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8")).get(LEFT_OUT) or {}
        if record and not (all(isinstance(name, str) for name in record["names"]) and all(record["files"].values())):
            raise ValueError(record)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__}: {error}", fix="take another checkpoint"
        ) from error
    found: Mapping[str, Any] = record
    return found


def given_weights(checkpoint: Path, given: Given | None) -> dict[str, Weight]:
    """What a checkpoint leaves out, as weights like those that are in its files.

    Args:
        checkpoint: Its folder.
        given: Reads them; without, they stay out.
    """
    record = left_out_of(checkpoint)
    if not record or given is None:
        return {}
    file = _InMemory(checkpoint, given(record))
    return {name: whole_weight(file, name, name) for name in record["names"]}


class _InMemory(StoredFile):
    """Tensors in the form of a file's."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(path)
        self._tensors = tensors

    def tensor(self, *keys: str | int) -> StoredTensor:
        """The tensor of a name."""
        import torch

        tensor = self._tensors[str(keys[0])].detach().contiguous()
        data = tensor.view(-1).view(torch.uint8).numpy().data
        storage = Storage(self.path, len(data), data=data)
        return StoredTensor(storage, of_torch(tensor.dtype), 0, tuple(tensor.shape), tensor.stride())
