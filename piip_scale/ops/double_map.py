"""A transposed convolution of kernel and stride 2 as one matrix product: no cell of its result has two sources."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    doubled: Tensor = _Double.apply(map_BCHW.permute(0, 2, 3, 1), weight_CO22, bias_O, dtype_out or map_BCHW.dtype)
    return doubled.permute(0, 3, 1, 2)


class _Double(torch.autograd.Function):
    """Keeps the map alone: the weights in the product's order are as large as they, and made again for its gradient.

    Cells take their places and are cast in one pass over memory each way; torch's own gradients would be two.
    """

    @staticmethod
    def forward(ctx: Any, map_BHWC: Tensor, weight_CO22: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
        batch, height, width, channels = map_BHWC.shape
        rows_NC = map_BHWC.reshape(-1, channels)
        ctx.save_for_backward(rows_NC, weight_CO22)
        ctx.has_bias = bias_O is not None
        weight_CK = _in_order(weight_CO22)
        found_NK = rows_NC @ weight_CK if bias_O is None else torch.addmm(bias_O.repeat(4), rows_NC, weight_CK)
        # Rows and columns of a cell's four go among the map's.
        placed_BH2W2O = _swapped(found_NK.view(batch, height, width, 2, 2, -1), dtype)
        return placed_BH2W2O.view(batch, 2 * height, 2 * width, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHWO: Tensor) -> tuple[Tensor | None, ...]:
        rows_NC, weight_CO22 = ctx.saved_tensors
        batch, height, width, channels = grad_BHWO.shape
        cells = grad_BHWO.reshape(batch, height // 2, 2, width // 2, 2, channels)
        grad_NK = _swapped(cells, rows_NC.dtype).view(rows_NC.shape[0], -1)
        grad_map = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_map = (grad_NK @ _in_order(weight_CO22).T).view(batch, height // 2, width // 2, -1)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows_NC.T @ grad_NK).view(-1, 2, 2, channels).permute(0, 3, 1, 2)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad_NK.sum(0).view(4, channels).sum(0)
        return grad_map, grad_weight, grad_bias, None


def _in_order(weight_CO22: Tensor) -> Tensor:
    """(C, O, 2, 2) to (C, 2 * 2 * O)."""
    return weight_CO22.permute(0, 2, 3, 1).reshape(weight_CO22.shape[0], -1)


def _swapped(cells: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, W, 2, 2, O) to (B, H, 2, W, 2, O), or back, in new memory."""
    return cells.transpose(2, 3).to(dtype, memory_format=torch.contiguous_format, copy=True)
