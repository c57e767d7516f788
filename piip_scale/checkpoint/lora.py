"""Low-rank additions merged into the weights that they are added to, a part of a weight at a time; needs no torch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piip_scale.checkpoint.casts import cast
from piip_scale.checkpoint.dtypes import FLOAT32, UINT8, DType
from piip_scale.checkpoint.origin import trained_config
from piip_scale.checkpoint.reading import OpenFiles
from piip_scale.checkpoint.stored import Weight
from piip_scale.checkpoint.stored_tensor import Read
from piip_scale.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_LORA, _DOWN, _UP, _BASE = ".lora.", ".lora.down", ".lora.up", ".weight"
_SCALE = ".weight_scale"
_BRANCH = "branches."


class Addition:
    """``scale * up @ down``, in float32, and the scales of a weight that is stored in 8 bits.

    Args:
        columns: Of the weight that it is added to.
        factors: ``scale``, ``down`` (rank, columns) and ``up`` (rows, rank); ``None`` for no addition.
        weight_scale: (rows,) of that weight, where there are some.
    """

    def __init__(self, columns: int, factors: tuple[float, Weight, Weight] | None, weight_scale: Weight | None) -> None:
        self._columns, self._given, self._weight_scale = columns, factors, weight_scale
        self.reads: list[Read] = []

    def of(self, first: int, count: int) -> Array | float:
        """Consecutive elements of the flattened addition."""
        if self._factors is None:
            return 0.0
        up, down = self._factors
        top, bottom = first // self._columns, -(-(first + count) // self._columns)
        rows: Array = (up[top:bottom] @ down).reshape(-1)
        return rows[first - top * self._columns :][:count]

    def adder(self, source: DType, target: DType, first: int) -> Callable[[memoryview], memoryview]:
        """Turns bytes of a weight from element ``first`` on, one part after the other, into those of the sum."""
        import numpy as np

        widen = self._widening(source)
        narrow = None if target == FLOAT32 else cast(FLOAT32, target)

        def added(data: memoryview) -> memoryview:
            nonlocal first
            values = widen(data)
            if self._weight_scale is not None:
                values = values * self._scales[np.arange(first, first + len(values)) // self._columns]
            summed = (values + self.of(first, len(values))).data.cast("B")
            first += len(values)
            return summed if narrow is None else narrow(summed)

        return added

    def _widening(self, source: DType) -> Callable[[memoryview], Array]:
        """From bytes to float32; 8 bits without a sign are those of e4m3."""
        import numpy as np

        if source == UINT8:
            return lambda data: _e4m3()[np.frombuffer(data, np.uint8)]
        if not source.is_floating_point:
            return lambda data: np.frombuffer(data, source.name).astype(np.float32)
        if source == FLOAT32:
            return lambda data: np.frombuffer(data, np.float32)
        widen = cast(source, FLOAT32)
        return lambda data: np.frombuffer(widen(data), np.float32)

    @cached_property
    def _scales(self) -> Array:
        assert self._weight_scale is not None
        return self._read(self._weight_scale)

    @cached_property
    def _factors(self) -> tuple[Array, Array] | None:
        import numpy as np

        if self._given is None:
            return None
        scale, down, up = self._given
        return self._read(up) * np.float32(scale), self._read(down)

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

    In a branch that has additions, what is stored in 8 bits becomes floats.

    Args:
        checkpoint: Its config knows the additions' factors.
        weights: By the model's names.

    Raises:
        CheckpointError: The config cannot be read, or has no additions where the weights have.
    """
    if not any(name.endswith(_DOWN) for name in weights):
        return dict(weights)
    scales = _scales(checkpoint)
    found: dict[str, Weight] = {}
    for name, weight in weights.items():
        layer = name.removesuffix(_BASE)
        factors = _factors_of(layer, weights, scales)
        scale = weights.get(layer + _SCALE) if _branch_of(name) in scales else None
        if name.endswith(_BASE) and (factors or scale):
            weight = replace(weight, addition=Addition(weight.shape[1], factors, scale))
        is_merged = _LORA in name or (name.endswith(_SCALE) and _branch_of(name) in scales)
        found |= {} if is_merged else {name: weight}
    return found


def _factors_of(
    layer: str, weights: Mapping[str, Weight], scales: Mapping[int, float]
) -> tuple[float, Weight, Weight] | None:
    down = weights.get(layer + _DOWN)
    if down is None:
        return None
    if _branch_of(layer) not in scales:
        raise CheckpointError(f"a checkpoint's config has no lora for {layer}", fix="take another checkpoint")
    return scales[_branch_of(layer)], down, weights[layer + _UP]


def _branch_of(name: str) -> int:
    """The index in a parameter's name; -1 for none."""
    number = name.partition(_BRANCH)[2].split(".")[0]
    return int(number) if number.isdecimal() else -1


@cache
def _e4m3() -> Array:
    """The value of every byte as a float of 4 bits of exponent and 3 of mantissa, without infinities.

    Source: Micikevicius et al., FP8 Formats for Deep Learning.
    """
    import numpy as np

    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
    values = np.where(bits & 128, -size, size).astype(np.float32)
    values[(bits & 127) == 127] = np.nan
    return values


def _scales(checkpoint: Path) -> dict[int, float]:
    branches = trained_config(checkpoint).model.branches
    loras = {index: getattr(branch, "lora", None) for index, branch in enumerate(branches)}
    return {index: lora.scale for index, lora in loras.items() if lora is not None}
