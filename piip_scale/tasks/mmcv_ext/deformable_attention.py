"""Multi-scale deformable attention in mmcv's calling convention, a level at a time.

Source: Zhu et al., Deformable DETR, 2021. The kernel is the one of PIIP's interactions: Triton's on a GPU, which holds
no samples; the reference elsewhere, which holds those of one level, and computes them anew for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from piip_scale.ops.deform_attention import deform_attention


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    im2col_step: int,
) -> Tensor:
    """Weighted sums of bilinear samples.

    Args:
        value: (B, S, M, D): batch, cells of all levels, heads, width of a head.
        value_spatial_shapes: int64 (L, 2): height and width of each level.
        value_level_start_index: Unused: it follows from the shapes.
        sampling_locations: (B, Q, M, L, P, 2), xy, 0-1 over the level; zero outside.
        attention_weights: (B, Q, M, L, P).
        im2col_step: Unused: a tuning knob of the compiled kernel.

    Returns:
        (B, Q, M * D), of ``value``'s dtype.
    """
    with torch.no_grad():
        total = _zeros(value, sampling_locations)
        for level, cells, size in _levels(value_spatial_shapes):
            locations, weights = sampling_locations[:, :, :, level], attention_weights[:, :, :, level]
            total += _level(value[:, cells].float(), size, locations.float(), weights.float())
    return total.flatten(2).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    *,
    im2col_step: int,
) -> None:
    """Gradients of ``ms_deform_attn_forward``, into the three given tensors."""
    grad_BQMD = grad_output.float().unflatten(2, value.shape[2:])
    for level, cells, size in _levels(value_spatial_shapes):
        inputs = (value[:, cells], sampling_locations[:, :, :, level], attention_weights[:, :, :, level])
        leaves = [tensor.detach().float().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            output = _level(leaves[0], size, leaves[1], leaves[2])
        grads = torch.autograd.grad(output, leaves, grad_BQMD)
        grad_value[:, cells] = grads[0].to(grad_value.dtype)
        grad_sampling_loc[:, :, :, level] = grads[1].to(grad_sampling_loc.dtype)
        grad_attn_weight[:, :, :, level] = grads[2].to(grad_attn_weight.dtype)


def _level(value_BSMD: Tensor, size: tuple[int, int], locations_BQMP2: Tensor, weights_BQMP: Tensor) -> Tensor:
    return deform_attention(value_BSMD.unflatten(1, size), locations_BQMP2, weights_BQMP)


def _levels(shapes: Tensor) -> Iterator[tuple[int, slice, tuple[int, int]]]:
    start = 0
    for level, (height, width) in enumerate(shapes.tolist()):
        yield level, slice(start, start + height * width), (height, width)
        start += height * width


def _zeros(value: Tensor, locations: Tensor) -> Tensor:
    return value.new_zeros(value.shape[0], locations.shape[1], *value.shape[2:], dtype=torch.float32)
