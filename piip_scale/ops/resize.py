"""Resampling of images, feature maps and position embeddings, always in at least float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def resize_image(image_BCHW: Tensor, scale: float) -> Tensor:
    """A smaller copy of a batch of images; the images themselves where ``scale`` is not below 1.

    Args:
        image_BCHW: Images (B, C, H, W), any float dtype.
        scale: Factor of both sides; the result has floor(H * scale) rows.

    Source: PIIP's released preprocessing, which hands over the factor and not the size, so sampling positions follow
        the exact factor even where the size is rounded.
    """
    if scale >= 1:
        return image_BCHW
    resized = functional.interpolate(
        at_least_float32(image_BCHW), scale_factor=scale, mode="bilinear", align_corners=False
    )
    return resized.to(image_BCHW.dtype)


def resize_map(map_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Feature maps on another grid, bilinear; float32 (B, C, height, width), float64 kept."""
    return functional.interpolate(
        at_least_float32(map_BCHW), size=(height, width), mode="bilinear", align_corners=False
    )


def resize_position(position_1NC: Tensor, side: int, height: int, width: int, how: str = "bicubic") -> Tensor:
    """A square position embedding on another grid, in the embedding's dtype.

    Args:
        position_1NC: Embedding (1, side * side, C), rows first.
        side: Side of its own grid.
        height: Rows wanted.
        width: Columns wanted.
        how: ``bicubic`` or ``bilinear``, to the grid; ``crop``, bilinear to a square over its longer side, of which
            the grid is the upper left; or ``tile``, repeated.

    Returns:
        (1, height, width, C).

    Source: ``bilinear`` as in Perception Encoder, ``crop`` as in C-RADIO's patch generator, ``tile`` as in SAM 3's
        image encoder.
    """
    if how == "tile":
        rows, columns = -(-height // side), -(-width // side)
        tiled_1HWC: Tensor = position_1NC.unflatten(1, (side, side)).tile(1, rows, columns, 1)
        return tiled_1HWC[:, :height, :width]
    grid_1CHW = at_least_float32(position_1NC).unflatten(1, (side, side)).permute(0, 3, 1, 2)
    size = (max(height, width),) * 2 if how == "crop" else (height, width)
    mode = "bicubic" if how == "bicubic" else "bilinear"
    resized = functional.interpolate(grid_1CHW, size=size, mode=mode, align_corners=False)
    return resized[..., :height, :width].permute(0, 2, 3, 1).to(position_1NC.dtype)


def at_least_float32(values: Tensor) -> Tensor:
    """The same values, in float32 if their own dtype is narrower."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
