"""Focal loss of logits, forward and backward by formula.

Source: Lin et al., Focal Loss for Dense Object Detection, 2017. Logarithms are bounded below at the smallest normal
float, as mmcv's kernels do.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def sigmoid_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    *,
    gamma: float,
    alpha: float,
) -> None:
    """Loss of every logit.

    Args:
        input: Logits (N, C).
        target: int64 (N,); C is background, for which every class is wrong.
        weight: (C,), or empty for none. Background rows keep weight 1.
        output: (N, C), receives the loss.
        gamma: Focusing exponent.
        alpha: Weight of the right class; the wrong ones have 1 - alpha.
    """
    p, is_target = input.float().sigmoid(), one_hot(target, input.shape[1])
    right = -alpha * (1 - p) ** gamma * p.clamp(min=TINY).log()
    wrong = -(1 - alpha) * p**gamma * (1 - p).clamp(min=TINY).log()
    output.copy_(torch.where(is_target, right, wrong) * row_weight(weight, target)[:, None])


def sigmoid_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    *,
    gamma: float,
    alpha: float,
) -> None:
    """Gradient of ``sigmoid_focal_loss_forward``'s sum, into ``grad_input`` (N, C)."""
    p, is_target = input.float().sigmoid(), one_hot(target, input.shape[1])
    right = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * p.clamp(min=TINY).log())
    wrong = -(1 - alpha) * p**gamma * (gamma * (1 - p) * (1 - p).clamp(min=TINY).log() - p)
    grad_input.copy_(torch.where(is_target, right, wrong) * row_weight(weight, target)[:, None])


def one_hot(target: Tensor, num_classes: int) -> Tensor:
    """Whether a class is its row's target, bool (N, C)."""
    return target[:, None] == torch.arange(num_classes, device=target.device)


def row_weight(weight: Tensor, target: Tensor) -> Tensor:
    """The weight of each row's class, float32 (N,); 1 of rows without one."""
    if not weight.numel():
        return torch.ones(target.shape, device=target.device)
    has_class = (target >= 0) & (target < len(weight))
    return torch.where(has_class, weight.float()[target.clamp(0, len(weight) - 1)], 1.0)
