"""Tables of relative position biases on other window sizes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_EXTRA_ROWS = 3
"""BEiT's tables end with the distances to, from and within the class token, which PIIP's windows have none of."""
_RATIO_RANGE = (1.01, 1.5)
_RATIO_TOLERANCE = 1e-6


def resize_position_table(table_RH: Tensor, window: int) -> Tensor:
    """A table of biases by distance for windows of another size.

    Nearby distances keep their values; far ones are stretched, each step further than the one before, until the table's
    edge lands on the new one.

    Args:
        table_RH: One row a distance ((2 * w - 1) ** 2, rows first, with or without BEiT's three of the class token),
            one column a head.
        window: Side of the new windows in tokens.

    Returns:
        ((2 * window - 1) ** 2, heads), in the table's dtype.

    Source: Bao et al., BEiT, as its released fine-tuning code does it.
    """
    side = int(table_RH.shape[0] ** 0.5)
    if side * side != table_RH.shape[0]:
        side = round((table_RH.shape[0] - _EXTRA_ROWS) ** 0.5)
    table_RH, wanted = table_RH[: side * side], 2 * window - 1
    if side == wanted:
        return table_RH
    from scipy.interpolate import RectBivariateSpline

    old = _stretched(side // 2, wanted // 2)
    new = np.arange(-(wanted // 2), wanted // 2 + 1, dtype=np.float64)
    heads = table_RH.double().T.reshape(-1, side, side).numpy()
    columns = [RectBivariateSpline(old, old, head)(new, new).ravel() for head in heads]
    return torch.from_numpy(np.stack(columns, -1)).to(table_RH.dtype)


def _stretched(num_steps: int, reach: int) -> np.ndarray:
    """Places of the old distances among the new: 0, 1, 1 + q, 1 + q + q ** 2 ... the last close to ``reach``."""
    low, high = _RATIO_RANGE
    ratio = low
    while high - low > _RATIO_TOLERANCE:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio**num_steps) / (1 - ratio) > reach else (ratio, high)
    places = np.cumsum(ratio ** np.arange(num_steps))
    return np.concatenate((-places[::-1], [0.0], places))
