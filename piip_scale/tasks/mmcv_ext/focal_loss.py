"""Focal loss of logits (sigmoid) and of probabilities (softmax), forward and backward by formula.

Source: Lin et al., Focal Loss for Dense Object Detection, 2017. Logarithms are bounded below at the smallest normal
float, as mmcv's kernels do.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


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
    p, is_target = input.float().sigmoid(), _one_hot(target, input.shape[1])
    right = -alpha * (1 - p) ** gamma * p.clamp(min=_TINY).log()
    wrong = -(1 - alpha) * p**gamma * (1 - p).clamp(min=_TINY).log()
    output.copy_(torch.where(is_target, right, wrong) * _row_weight(weight, target)[:, None])


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
    p, is_target = input.float().sigmoid(), _one_hot(target, input.shape[1])
    right = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * p.clamp(min=_TINY).log())
    wrong = -(1 - alpha) * p**gamma * (gamma * (1 - p) * (1 - p).clamp(min=_TINY).log() - p)
    grad_input.copy_(torch.where(is_target, right, wrong) * _row_weight(weight, target)[:, None])


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
    loss = -alpha * (1 - p) ** gamma * p.clamp(min=_TINY).log()
    output.copy_(torch.where(target >= 0, loss * _row_weight(weight, target), 0.0))


def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Gradient of ``softmax_focal_loss_forward``'s sum towards the logits, into ``grad_input`` (N, C)."""
    p = _of_target(softmax, target)
    rest = 1 - p
    # At gamma < 1 and p = 1 the second factor is infinite, and its product with log(1) is 0 in the limit.
    bend = torch.where(rest > 0, gamma * rest ** (gamma - 1) * p * p.clamp(min=_TINY).log(), 0.0)
    slope = alpha * (bend - rest**gamma) * _row_weight(weight, target)
    buff.copy_(torch.where(target >= 0, slope, 0.0))
    grad_input.copy_(buff[:, None].float() * (_one_hot(target, softmax.shape[1]).float() - softmax.float()))


def _one_hot(target: Tensor, num_classes: int) -> Tensor:
    return target[:, None] == torch.arange(num_classes, device=target.device)


def _of_target(softmax: Tensor, target: Tensor) -> Tensor:
    return softmax.float().gather(1, target.clamp(min=0)[:, None])[:, 0]


def _row_weight(weight: Tensor, target: Tensor) -> Tensor:
    if not weight.numel():
        return torch.ones(target.shape, device=target.device)
    has_class = (target >= 0) & (target < len(weight))
    return torch.where(has_class, weight.float()[target.clamp(0, len(weight) - 1)], 1.0)
