"""How much of a device's arithmetic a training uses, by the task's own count of its network's multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from piip_scale.engine.gpus import gpu_of_device

_KNOWN_SIZES = 512


@dataclass(frozen=True)
class Utilisation:
    """Turns the sizes of a step's images into arithmetic.

    Attributes:
        flops_of_image: The task's ``network_flops``: model FLOPs of a training step by an image's height and width.
        peak_tflops: Of the device in the precision of the run, ``None`` where it is not known.
    """

    flops_of_image: Callable[[int, int], int]
    peak_tflops: float | None

    @cached_property
    def _flops(self) -> Callable[[int, int], int]:
        # Training of several scales meets hundreds of sizes, again and again.
        return lru_cache(maxsize=_KNOWN_SIZES)(self.flops_of_image)

    def tflops(self, sizes_px: Iterable[tuple[int, int]], seconds: float) -> float:
        """Model TFLOP/s of the network, as far as it is trained; see ``models.work`` for the rule.

        Args:
            sizes_px: Height and width of the network's input, for each image.
            seconds: What they took.
        """
        return sum(self._flops(*size) for size in sizes_px) / seconds / 1e12

    def mfu(self, tflops: float) -> float | None:
        """Share of the peak; ``None`` where that is not known."""
        return None if self.peak_tflops is None else tflops / self.peak_tflops

    @property
    def line(self) -> str:
        """What the numbers of a run stand for, for its log."""
        peak = "of a peak that is not known here" if self.peak_tflops is None else f"of {self.peak_tflops:g} TFLOP/s"
        return f"model TFLOP/s and MFU ({peak}): the network as far as it is trained, without neck and heads"


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """The device's dense peak in bf16; ``None`` for a CPU, another precision or a device not in the table."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU by the name that CUDA gives it."""
    gpu = gpu_of_device(device_name)
    return None if gpu is None else gpu.bf16_tflops
