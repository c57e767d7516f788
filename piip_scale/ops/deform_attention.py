"""Deformable attention over one feature map: a PyTorch reference for any device, and the choice of a kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from piip_scale.errors import KernelError
from piip_scale.ops.cells import cell_centres, grid_size
from piip_scale.ops.fused import auto_takes_triton, check_triton_cache, require_runs_triton, require_triton
from piip_scale.ops.resize import at_least_float32

_FIX = "set deform_kernel to auto or reference"


def deform_attention(
    value_BHWMD: Tensor, locations_BLMP2: Tensor, weights_BLMP: Tensor, kernel: str = "auto"
) -> Tensor:
    """Each query's weighted sum of a few bilinear samples of the values, per head.

    Args:
        value_BHWMD: Values on their grid (B, H, W, heads, D).
        locations_BLMP2: Where queries look, x then y, 0 and 1 being the map's outer edges (B, L, heads, points, 2).
            At least float32: half precision cannot tell neighbouring cells of a large map apart.
        weights_BLMP: Weight of each sample (B, L, heads, points).
        kernel: ``reference``, ``triton`` or ``auto``.

    Returns:
        (B, L, heads, D) in the values' dtype; samples outside the map are zero.

    Raises:
        KernelError: The kernel named cannot serve these tensors on this machine, or its cache is not to be trusted.

    Source: Zhu et al., Deformable DETR, equation 2, with one level.
    """
    if resolve_deform_kernel(kernel, value_BHWMD.device.type, value_BHWMD.dtype) == "triton":
        check_triton_cache()
        # The module compiles nothing before its first call, but it needs triton to be imported.
        from piip_scale.ops.deform_attention_triton import deform_attention_triton

        return deform_attention_triton(value_BHWMD, locations_BLMP2.float(), weights_BLMP.float())
    return deform_attention_reference(value_BHWMD, locations_BLMP2, weights_BLMP)


def grid_deform_attention(
    value_BHWMD: Tensor, offsets_BhwMP2: Tensor, scores_BhwMP: Tensor, kernel: str = "auto"
) -> Tensor:
    """``deform_attention`` of queries that are a grid's cells, each looking around its own place.

    Args:
        value_BHWMD: Values on their grid (B, H, W, heads, D).
        offsets_BhwMP2: How far from its own centre each of h * w cells looks, x then y, in cells of the values' grid
            (B, h, w, heads, points, 2).
        scores_BhwMP: A softmax over a cell's points makes their weights of these (B, h, w, heads, points).
        kernel: ``reference``, ``triton`` or ``auto``.

    Returns:
        (B, h, w, heads, D) in the values' dtype; samples outside the values' grid are zero.

    Raises:
        KernelError: The kernel named cannot serve these tensors on this machine, or its cache is not to be trusted.
    """
    if resolve_deform_kernel(kernel, value_BHWMD.device.type, value_BHWMD.dtype) == "triton":
        check_triton_cache()
        from piip_scale.ops.deform_attention_triton import grid_deform_attention_triton

        return grid_deform_attention_triton(value_BHWMD, offsets_BhwMP2, scores_BhwMP)
    return grid_deform_attention_reference(value_BHWMD, offsets_BhwMP2, scores_BhwMP)


def grid_deform_attention_reference(value_BHWMD: Tensor, offsets_BhwMP2: Tensor, scores_BhwMP: Tensor) -> Tensor:
    """``grid_deform_attention`` by torch's operators, in at least float32."""
    rows, columns = value_BHWMD.shape[1:3]
    height, width = scores_BhwMP.shape[1:3]
    weights_BhwMP = at_least_float32(scores_BhwMP).softmax(-1)
    centres_hw112 = cell_centres(height, width, value_BHWMD.device)[:, :, None, None]
    cells_2 = grid_size(rows, columns, value_BHWMD.device)
    locations_BhwMP2 = centres_hw112 + at_least_float32(offsets_BhwMP2) / cells_2
    found_BLMD = deform_attention_reference(value_BHWMD, locations_BhwMP2.flatten(1, 2), weights_BhwMP.flatten(1, 2))
    found_BhwMD: Tensor = found_BLMD.unflatten(1, (height, width))
    return found_BhwMD


def deform_attention_reference(value_BHWMD: Tensor, locations_BLMP2: Tensor, weights_BLMP: Tensor) -> Tensor:
    """``deform_attention`` by ``grid_sample``, computed in the locations' dtype; holds every sample in memory."""
    batch, height, width, heads, channels = value_BHWMD.shape
    wide = locations_BLMP2.dtype
    maps_NDHW = value_BHWMD.to(wide).permute(0, 3, 4, 1, 2).reshape(batch * heads, channels, height, width)
    grid_NLP2 = (2 * locations_BLMP2 - 1).transpose(1, 2).flatten(0, 1)
    samples_NDLP = _sample(maps_NDHW, grid_NLP2)
    weights_N1LP = weights_BLMP.to(wide).transpose(1, 2).flatten(0, 1).unsqueeze(1)
    output_NDL = (samples_NDLP * weights_N1LP).sum(-1)
    output_BLMD: Tensor = output_NDL.unflatten(0, (batch, heads)).permute(0, 3, 1, 2)
    return output_BLMD.to(value_BHWMD.dtype)


def _sample(maps_NDHW: Tensor, grid_NLP2: Tensor) -> Tensor:
    if torch.are_deterministic_algorithms_enabled():
        return sample_by_gathers(maps_NDHW, grid_NLP2)
    return functional.grid_sample(maps_NDHW, grid_NLP2, "bilinear", "zeros", align_corners=False)


def sample_by_gathers(maps_NDHW: Tensor, grid_NLP2: Tensor) -> Tensor:
    """``grid_sample`` (bilinear, zeros outside, edges at -1 and 1) whose backward pass is deterministic on a GPU too.

    torch's own adds gradients with atomics there and refuses to in deterministic mode; the one of ``gather`` does not.

    Returns:
        (N, D, L, P).
    """
    height, width = maps_NDHW.shape[2:]
    place_NLP2 = (grid_NLP2 + 1) * grid_NLP2.new_tensor([width, height]) / 2 - 0.5
    corner_NLP2 = place_NLP2.floor()
    total: Tensor = maps_NDHW.new_zeros(())
    for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
        at_NLP2 = corner_NLP2 + corner_NLP2.new_tensor([right, below])
        share_NLP = (1 - (place_NLP2 - at_NLP2).abs()).prod(-1)
        x_NLP, y_NLP = at_NLP2.long().unbind(-1)
        inside_NLP = (x_NLP >= 0) & (x_NLP < width) & (y_NLP >= 0) & (y_NLP < height)
        index_NLP = (y_NLP.clamp(0, height - 1) * width + x_NLP.clamp(0, width - 1)).flatten(1)
        picked_NDK = maps_NDHW.flatten(2).gather(2, index_NLP.unsqueeze(1).expand(-1, maps_NDHW.shape[1], -1))
        total = total + picked_NDK.unflatten(2, share_NLP.shape[1:]) * (share_NLP * inside_NLP).unsqueeze(1)
    return total


def resolve_deform_kernel(name: str, device: str | torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The kernel that ``name`` means for values of this device and dtype: ``reference`` or ``triton``.

    Args:
        name: A kernel, or ``auto`` for the fastest present.
        device: Where the values are.
        dtype: Their dtype.

    Raises:
        KernelError: The kernel named is unknown, not installed, or not for this device and dtype.
    """
    device_type = torch.device(device).type
    if name == "reference":
        return name
    if name == "auto":
        usable = auto_takes_triton(device_type, dtype) and not torch.are_deterministic_algorithms_enabled()
        return "triton" if usable else "reference"
    if name != "triton":
        raise KernelError("unknown deformable attention kernel", value=name, rule="one of auto, reference, triton")
    require_deform_kernel(name)
    if torch.are_deterministic_algorithms_enabled():
        raise KernelError(
            "deformable attention kernel triton is not deterministic: its backward pass adds with atomics",
            fix="set deform_kernel to auto or reference, or train.deterministic to false",
        )
    require_runs_triton("deformable attention kernel triton", device_type, dtype, _FIX)
    return "triton"


def require_deform_kernel(name: str) -> None:
    """Raises a ``KernelError`` where the library of a kernel asked for by name is not installed."""
    if name == "triton":
        require_triton("deformable attention kernel triton", _FIX)
