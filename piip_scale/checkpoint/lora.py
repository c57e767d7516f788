"""Low-rank additions merged into the weights that they are added to, a part of a weight at a time; needs no torch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piip_scale.checkpoint.casts import cast
from piip_scale.checkpoint.dtypes import FLOAT32, DType
from piip_scale.checkpoint.origin import trained_config
from piip_scale.checkpoint.reading import OpenFiles
from piip_scale.checkpoint.stored import Weight
from piip_scale.checkpoint.stored_tensor import Read
from piip_scale.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_LORA, _DOWN, _UP, _BASE = ".lora.", ".lora.down", ".lora.up", ".weight"
_BRANCH = "branches."


class Addition:
    """``scale * up @ down``, float32 as the weight that it is added to.

    Args:
        scale: The factor.
        down: (rank, columns).
        up: (rows, rank).
    """

    def __init__(self, scale: float, down: Weight, up: Weight) -> None:
        self._scale, self._down, self._up = scale, down, up
        self.reads: list[Read] = []

    def of(self, first: int, count: int) -> Array:
        """Consecutive elements of the flattened addition."""
        up, down = self._factors
        columns = down.shape[1]
        top, bottom = first // columns, -(-(first + count) // columns)
        rows: Array = (up[top:bottom] @ down).reshape(-1)
        return rows[first - top * columns :][:count]

    def adder(self, source: DType, target: DType, first: int) -> Callable[[memoryview], memoryview]:
        """Turns bytes of a weight from element ``first`` on, one part after the other, into those of the sum."""
        import numpy as np

        widen = None if source == FLOAT32 else cast(source, FLOAT32)
        narrow = None if target == FLOAT32 else cast(FLOAT32, target)

        def added(data: memoryview) -> memoryview:
            nonlocal first
            values = np.frombuffer(data if widen is None else widen(data), np.float32)
            summed = (values + self.of(first, len(values))).data.cast("B")
            first += len(values)
            return summed if narrow is None else narrow(summed)

        return added

    @cached_property
    def _factors(self) -> tuple[Array, Array]:
        import numpy as np

        up, down = self._read(self._up), self._read(self._down)
        return up * np.float32(self._scale), down

    def _read(self, weight: Weight) -> Array:
        import numpy as np

        files, parts = OpenFiles(), []
        for part in weight.parts:
            tensor, size = part.tensor(weight.dtype), weight.dtype.itemsize
            data = memoryview(bytearray(part.slice.length * size))
            files.read_elements(data, tensor, part.slice.start)
            place = (tensor.offset + part.slice.start) * size
            self.reads.append(Read(tensor.storage, place, len(data), zlib.crc32(data)))
            wide = data if weight.dtype == FLOAT32 else cast(weight.dtype, FLOAT32)(data)
            parts.append(np.frombuffer(wide, np.float32))
        files.close()
        return np.concatenate(parts).reshape(weight.shape)


def merged(checkpoint: Path, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """A checkpoint's weights with low-rank additions inside the weights they belong to; without any, as they are.

    Args:
        checkpoint: Its config knows the additions' factors.
        weights: By the model's names.

    Raises:
        CheckpointError: The config cannot be read, or has no additions where the weights have.
    """
    downs = [name for name in weights if name.endswith(_DOWN)]
    if not downs:
        return dict(weights)
    scales = _scales(checkpoint)
    found = {name: weight for name, weight in weights.items() if _LORA not in name}
    for name in downs:
        layer = name.removesuffix(_DOWN)
        branch = int(layer[layer.index(_BRANCH) + len(_BRANCH) :].split(".")[0]) if _BRANCH in layer else -1
        if branch not in scales:
            raise CheckpointError(f"{checkpoint}: its config has no lora for {name}", fix="take another checkpoint")
        addition = Addition(scales[branch], weights[name], weights[layer + _UP])
        found[layer + _BASE] = replace(weights[layer + _BASE], addition=addition)
    return found


def _scales(checkpoint: Path) -> dict[int, float]:
    branches = trained_config(checkpoint).model.branches
    loras = {index: getattr(branch, "lora", None) for index, branch in enumerate(branches)}
    return {index: lora.scale for index, lora in loras.items() if lora is not None}
