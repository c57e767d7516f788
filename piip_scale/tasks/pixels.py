"""From a batch's pixels to what a network takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from piip_scale.data.batch import Batch

Rgb = tuple[float, float, float]


def network_input(batch: Batch, mean: Rgb, std: Rgb) -> Tensor:
    """Normalised images, float32 (B, 3, H, W); padding is zero after normalisation, as mmdet pads.

    Args:
        batch: On the network's device.
        mean: Subtracted from the channels, 0 to 255.
        std: Divides them after that.
    """
    images = batch.images_BHWC.permute(0, 3, 1, 2).float()
    device = images.device
    mean_C11, std_C11 = (sent(values, device).view(1, 3, 1, 1) for values in (mean, std))
    sizes = sent([info.size_px for info in batch.infos], device)
    rows, columns = (torch.arange(length, device=device) for length in images.shape[2:])
    inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None, :]
    return (images - mean_C11) / std_C11 * inside[:, None]


def sent(values: Sequence[Any], device: torch.device) -> Tensor:
    """Numbers as a tensor on a device, without a wait for it, which ``torch.tensor(values, device=...)`` is."""
    return torch.tensor(values).to(device, non_blocking=True)
