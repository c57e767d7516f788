"""A transposed convolution of kernel and stride 2 as one matrix product: no cell of its result has two sources."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def double_map(
    map_BCHW: Tensor, weight_CO22: Tensor, bias_O: Tensor | None = None, dtype_out: torch.dtype | None = None
) -> Tensor:
    """``functional.conv_transpose2d(map, weight, bias, stride=2)``, its result's channels together in memory.

    Args:
        map_BCHW: (B, C, H, W); nothing is copied where its channels lie together.
        weight_CO22: (C, O, 2, 2), the map's dtype; must be called inside the module that owns it.
        bias_O: (O), likewise.
        dtype_out: Of the result, cast while cells take their places; the map's where ``None``.

    Returns:
        (B, O, 2 H, 2 W).
    """
    batch, channels, height, width = map_BCHW.shape
    rows_NC = map_BCHW.permute(0, 2, 3, 1).reshape(-1, channels)
    weight_CK = weight_CO22.permute(0, 2, 3, 1).reshape(channels, -1)
    found_NK = rows_NC @ weight_CK if bias_O is None else torch.addmm(bias_O.repeat(4), rows_NC, weight_CK)
    cells_BHW22O = found_NK.view(batch, height, width, 2, 2, -1)
    placed: Tensor = _Place.apply(cells_BHW22O, dtype_out or map_BCHW.dtype)
    return placed.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


class _Place(torch.autograd.Function):
    """Puts rows and columns of each cell's four among the map's, and casts, in one pass over memory each way.

    torch's own gradients of the two would be a pass each.
    """

    @staticmethod
    def forward(ctx: Any, cells_BHW22O: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = cells_BHW22O.dtype
        return _transposed(cells_BHW22O, dtype)

    @staticmethod
    def backward(ctx: Any, grad_BH2W2O: Tensor) -> tuple[Tensor, None]:
        return _transposed(grad_BH2W2O, ctx.dtype), None


def _transposed(cells: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, W, 2, 2, O) to (B, H, 2, W, 2, O), or back, in new memory."""
    return cells.transpose(2, 3).to(dtype, memory_format=torch.contiguous_format, copy=True)
