"""Adding a feature map to a sum on another grid: resized, weighted and added, in one pass where a kernel is present."""

from __future__ import annotations

from torch import Tensor

from piip_scale.ops.fused import check_triton_cache, uses_triton
from piip_scale.ops.resize import resize_map


def add_resized(
    total_BCHW: Tensor | None, map_BCHW: Tensor, weight_1: Tensor, height: int, width: int, kernel: str = "auto"
) -> Tensor:
    """``total + weight * resized``, bilinear.

    Args:
        total_BCHW: What to add to, float32 (B, C, height, width); ``None`` begins a sum.
        map_BCHW: A map on any grid, any float dtype.
        weight_1: One number; must be called inside the module that owns it.
        height: Rows of the sum's grid.
        width: Its columns.
        kernel: ``plain``, ``triton`` or ``auto``.

    Returns:
        Of the sum's shape in at least float32; the kernel's with its channels together.

    Raises:
        KernelError: The kernel named cannot serve these tensors on this machine.
    """
    if uses_triton(kernel, map_BCHW, weight_1):
        check_triton_cache()
        from piip_scale.ops.merge_map_triton import add_resized_triton

        total_BHWC = None if total_BCHW is None else total_BCHW.permute(0, 2, 3, 1)
        merged_BHWC = add_resized_triton(total_BHWC, map_BCHW.permute(0, 2, 3, 1), weight_1, height, width)
        return merged_BHWC.permute(0, 3, 1, 2)
    weighted_BCHW = resize_map(map_BCHW, height, width) * weight_1
    return weighted_BCHW if total_BCHW is None else total_BCHW + weighted_BCHW
