"""Deformable convolution, plain and modulated, by torchvision's kernels in mmcv's calling convention.

Source: Dai et al., 2017, and Zhu et al., 2019 (modulated). mmcv's scratch tensors (``columns``, ``ones``) stay unused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **geometry: Any,
) -> None:
    """Convolves features sampled at moved positions.

    Args:
        input: (B, C, H, W).
        weight: (O, C / groups, kH, kW).
        offset: (B, 2 * deformable groups * kH * kW, H', W'), y before x.
        output: (B, O, H', W'), receives the result.
        columns: Unused.
        ones: Unused.
        geometry: Strides (dH, dW), paddings (padH, padW), dilations, ``group`` and ``deformable_group``.
    """
    output.copy_(_forward(input, weight, offset, _no_mask(input), _no_bias(weight), _plain(geometry)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: Any,
) -> None:
    """Gradients towards features and offsets, into ``grad_input`` and ``grad_offset``."""
    grads = _backward(grad_output, input, weight, offset, _no_mask(input), _no_bias(weight), _plain(geometry))
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    *,
    scale: float,
    **geometry: Any,
) -> None:
    """Gradient towards the kernel times ``scale``, into ``grad_weight``."""
    grads = _backward(grad_output, input, grad_weight, offset, _no_mask(input), _no_bias(grad_weight), _plain(geometry))
    grad_weight.copy_(grads[1] * scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **geometry: Any,
) -> None:
    """As above; samples are multiplied by ``mask`` (B, deformable groups * kH * kW, H', W'), ``bias`` is added."""
    bias = bias if geometry["with_bias"] else _no_bias(weight)
    output.copy_(_forward(input, weight, offset, mask, bias, _modulated(geometry)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    **geometry: Any,
) -> None:
    """Gradients of ``modulated_deform_conv_forward``, into the ``grad_`` tensors."""
    bias = bias if geometry["with_bias"] else _no_bias(weight)
    grads = _backward(grad_output, input, weight, offset, mask, bias, _modulated(geometry))
    for target, grad in zip((grad_input, grad_weight, grad_offset, grad_mask), grads[:4], strict=True):
        target.copy_(grad)
    if geometry["with_bias"]:
        grad_bias.copy_(grads[4])


_Geometry = tuple[int, int, int, int, int, int, int, int, bool]


def _plain(geometry: dict[str, Any]) -> _Geometry:
    keys = ("dH", "dW", "padH", "padW", "dilationH", "dilationW", "group", "deformable_group")
    return (*(int(geometry[key]) for key in keys), False)  # type: ignore[return-value]


def _modulated(geometry: dict[str, Any]) -> _Geometry:
    keys = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "group", "deformable_group")
    return (*(int(geometry[key]) for key in keys), True)  # type: ignore[return-value]


def _forward(
    features: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, geometry: _Geometry
) -> Tensor:
    tensors = (tensor.float() for tensor in (features, weight, offset, mask, bias))
    output: Tensor = torch.ops.torchvision.deform_conv2d(*tensors, *geometry)
    return output


def _backward(
    grad: Tensor, features: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, geometry: _Geometry
) -> tuple[Tensor, ...]:
    tensors = (tensor.float() for tensor in (grad, features, weight, offset, mask, bias))
    return tuple(torch.ops.torchvision._deform_conv2d_backward(*tensors, *geometry))


def _no_mask(features: Tensor) -> Tensor:
    return features.new_zeros((features.shape[0], 1))


def _no_bias(weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0])
