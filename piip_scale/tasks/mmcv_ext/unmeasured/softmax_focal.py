"""Focal loss of probabilities, forward and backward by formula.

Source: Lin et al., Focal Loss for Dense Object Detection, 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor

from piip_scale.tasks.mmcv_ext.focal_loss import TINY, one_hot, row_weight


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Loss of every row.

    Args:
        softmax: Probabilities (N, C).
        target: int64 (N,); a negative one is ignored.
        weight: (C,), or empty for none.
        output: (N,), receives the loss.
        gamma: Focusing exponent.
        alpha: Weight of the loss.
    """
    p = _of_target(softmax, target)
    loss = -alpha * (1 - p) ** gamma * p.clamp(min=TINY).log()
    output.copy_(torch.where(target >= 0, loss * row_weight(weight, target), 0.0))


def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Gradient of ``softmax_focal_loss_forward``'s sum towards the logits, into ``grad_input`` (N, C)."""
    p = _of_target(softmax, target)
    rest = 1 - p
    # At gamma < 1 and p = 1 the second factor is infinite, and its product with log(1) is 0 in the limit.
    bend = torch.where(rest > 0, gamma * rest ** (gamma - 1) * p * p.clamp(min=TINY).log(), 0.0)
    slope = alpha * (bend - rest**gamma) * row_weight(weight, target)
    buff.copy_(torch.where(target >= 0, slope, 0.0))
    grad_input.copy_(buff[:, None].float() * (one_hot(target, softmax.shape[1]).float() - softmax.float()))


def _of_target(softmax: Tensor, target: Tensor) -> Tensor:
    return softmax.float().gather(1, target.clamp(min=0)[:, None])[:, 0]
