"""Arithmetic of a pass, and what share of the device's peak a rate is: the same count as in training."""

from __future__ import annotations

import torch

from piip_scale.config.detection import DetectionRun
from piip_scale.engine.utilisation import peak_tflops
from piip_scale.tasks.counting import network_flops

NUM_CLASSES = 80


def network_tflop(config: DetectionRun, size_px: tuple[int, int], images: int) -> float:
    """TFLOP of a forward and backward pass of the network, without heads and without what is computed anew."""
    return images * network_flops(config, NUM_CLASSES, *size_px) / 1e12


def peak_share(tflops: float, device: torch.device) -> float | None:
    """MFU by the data sheet's dense bf16; ``None`` where the device is not known."""
    peak = peak_tflops(device, "bf16")
    return None if peak is None else tflops / peak
