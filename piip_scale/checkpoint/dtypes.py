"""Element types by name, as torch's pickles and safetensors' headers know them; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """An element type.

    Attributes:
        name: As torch calls it: ``float32``.
        code: As a safetensors header calls it: ``F32``.
        itemsize: Bytes of an element.
        is_floating_point: Whether it holds fractions.
    """

    name: str
    code: str
    itemsize: int
    is_floating_point: bool = False

    def to_torch(self) -> torch.dtype:
        """The same of torch."""
        import torch

        found: torch.dtype = getattr(torch, self.name)
        return found


FLOAT32 = DType("float32", "F32", 4, True)
BFLOAT16 = DType("bfloat16", "BF16", 2, True)
FLOAT16 = DType("float16", "F16", 2, True)
UINT8 = DType("uint8", "U8", 1)

DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("float64", "F64", 8, True),
        FLOAT32,
        BFLOAT16,
        FLOAT16,
        DType("int64", "I64", 8),
        DType("int32", "I32", 4),
        DType("int16", "I16", 2),
        DType("int8", "I8", 1),
        UINT8,
        DType("bool", "BOOL", 1),
    )
}
"""All that are read and written, by torch's name."""


def of_torch(dtype: torch.dtype) -> DType:
    """Ours for one of torch's.

    Raises:
        KeyError: There is none.
    """
    return DTYPES[str(dtype).removeprefix("torch.")]
