"""Tensors of torch's into a safetensors file, in memory for one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from piip_scale.checkpoint.dtypes import of_torch
from piip_scale.checkpoint.safetensors_writer import Entry, SafetensorsWriter, in_file_order


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
) -> None:
    """Writes a file, which is removed again where that fails.

    Args:
        path: The file, replaced where present.
        tensors: Shape and dtype of each, by name.
        metadata: Texts for the header.
        read: Gives a tensor on the CPU, of its dtype and as many elements, when its turn comes.

    Raises:
        OSError: The disk refuses.
    """
    entries = in_file_order(Entry(name, shape, of_torch(dtype)) for name, (shape, dtype) in tensors.items())
    with SafetensorsWriter(path, entries, metadata) as writer:
        for entry in entries:
            values = read(entry.name).detach().contiguous().reshape(-1).view(torch.uint8)
            writer.write(entry.name, 0, values.numpy().data)
