"""From one element type to another, as torch rounds, on bytes: numpy's, and bfloat16 that numpy lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from piip_scale.checkpoint.dtypes import BFLOAT16, DType

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_HALF_BITS = 16
_QUIET_NAN = 0x7FC0
_ROUND_UP = 0x7FFF


def cast(source: DType, target: DType) -> Callable[[memoryview], memoryview]:
    """Turns bytes of elements of one type into bytes of another; bfloat16 and float32 to the nearest, even on a tie.

    Raises:
        OverflowError: When called: the largest of finite numbers that have no place in the target.
    """
    import numpy as np

    def converted(data: memoryview) -> memoryview:
        values = _widened(np.frombuffer(data, np.uint16)) if source == BFLOAT16 else np.frombuffer(data, source.name)
        if target == BFLOAT16:
            return _narrowed(values.astype(np.float32, copy=False)).data.cast("B")
        with np.errstate(over="ignore"):
            made = values.astype(target.name)
        _check_finite(values, made)
        return made.data.cast("B")

    return converted


def _widened(halves: Array) -> Array:
    import numpy as np

    return (halves.astype(np.uint32) << _HALF_BITS).view(np.float32)


def _narrowed(values: Array) -> Array:
    import numpy as np

    bits = values.view(np.uint32)
    # Half a unit of what stays, less one where that is even: ties go to even.
    rounded = bits >> _HALF_BITS
    rounded &= 1
    rounded += _ROUND_UP
    rounded += bits
    rounded >>= _HALF_BITS
    halves = rounded.astype(np.uint16)
    # The largest is NaN where any is: one pass where there is none, as nearly always.
    if np.isnan(values.max()):
        halves[np.isnan(values)] = _QUIET_NAN
    return halves


def _check_finite(before: Array, after: Array) -> None:
    import numpy as np

    if after.dtype.itemsize >= before.dtype.itemsize or np.isfinite(after).all():
        return
    lost = before[np.isfinite(before) & ~np.isfinite(after)]
    if lost.size:
        raise OverflowError(float(np.abs(lost).max()))
