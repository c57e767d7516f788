"""How much of a device's arithmetic a training uses, by our own count of the network's multiply-adds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from piip_scale.config.model import PiipConfig
from piip_scale.models.counting import count_network

# Dense bf16, from the vendor's data sheets; of two names that fit, the first.
_PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
}
_FLOPS_PER_MAC = 2
# Forward once, backward twice: for the inputs and for the weights. What is computed anew does not count.
_PASSES = 3


@dataclass(frozen=True)
class Utilisation:
    """Turns the sizes of a step's images into arithmetic.

    Attributes:
        network: What is counted; neck and heads are left out.
        peak_tflops: Of the device in the precision of the run, ``None`` where it is not known.
    """

    network: PiipConfig
    peak_tflops: float | None

    def tflops(self, sizes_px: Iterable[tuple[int, int]], seconds: float) -> float:
        """Model TFLOP/s: two for each multiply-add, forward once and backward twice, as if nothing were frozen.

        Args:
            sizes_px: Height and width of the network's input, for each image.
            seconds: What they took.
        """
        macs = sum(_network_macs(self.network, *size) for size in sizes_px)
        return _FLOPS_PER_MAC * _PASSES * macs / seconds / 1e12

    def mfu(self, tflops: float) -> float | None:
        """Share of the peak; ``None`` where that is not known."""
        return None if self.peak_tflops is None else tflops / self.peak_tflops


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """The device's dense peak in bf16; ``None`` for a CPU, another precision or a device not in the table."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU by the name that CUDA gives it."""
    return next((peak for name, peak in _PEAK_TFLOPS.items() if name in device_name), None)


@lru_cache(maxsize=512)
def _network_macs(network: PiipConfig, height_px: int, width_px: int) -> int:
    return sum(part.total_macs for part in count_network(network, height_px, width_px))
