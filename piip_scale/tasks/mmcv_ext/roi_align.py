"""RoIAlign by torchvision's kernels, in mmcv's calling convention: results go into given tensors."""

from __future__ import annotations

import torch
import torchvision  # noqa: F401  # registers the operators
from torch import Tensor

from piip_scale.errors import KernelError

_AVERAGE = 1


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Samples features under boxes.

    Args:
        input: Features (B, C, H, W).
        rois: (R, 5): index into B, and xyxy in px of the image.
        output: (R, C, aligned_height, aligned_width), receives the result.
        argmax_y: Unused: only max pooling needs it.
        argmax_x: Unused.
        aligned_height: Rows of bins.
        aligned_width: Columns of bins.
        spatial_scale: Feature cells per pixel.
        sampling_ratio: Samples per bin and axis; 0 takes as many as the box has cells per bin.
        pool_mode: 1 for averaging.
        aligned: Whether cell centres lie at halves.

    Raises:
        KernelError: ``pool_mode`` asks for max pooling.
    """
    _check_average(pool_mode)
    # Not torchvision's function: in deterministic mode that computes the same in Python, all samples in memory.
    bins = (spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned)
    output.copy_(torch.ops.torchvision.roi_align(input.float(), rois.float(), *bins))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of ``roi_align_forward`` towards the features, into ``grad_input`` (B, C, H, W)."""
    _check_average(pool_mode)
    # On a GPU torchvision adds with atomics, and refuses to in deterministic mode; on the host it adds in order.
    device = torch.device("cpu") if torch.are_deterministic_algorithms_enabled() else grad_output.device
    grad = torch.ops.torchvision._roi_align_backward(
        grad_output.float().to(device),
        rois.float().to(device),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    grad_input.copy_(grad)


def _check_average(pool_mode: int) -> None:
    if pool_mode != _AVERAGE:
        raise KernelError("RoIAlign with max pooling is not in the stand-in", fix="use pool_mode='avg'")
