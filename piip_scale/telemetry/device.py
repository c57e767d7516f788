"""How busy a GPU says it is."""

from __future__ import annotations

import functools
import importlib.util

import torch

from piip_scale.logging import get_logger


def gpu_utilisation(device: torch.device) -> float | None:
    """Share of the driver's last sample, up to a second, in which a kernel ran, 0 to 1; without waiting for the device.

    ``None`` for a CPU, and where NVML (the package nvidia-ml-py) does not answer, which is logged once.
    """
    if device.type != "cuda" or not _has_nvml():
        return None
    try:
        return torch.cuda.utilization(device) / 100
    except Exception as error:  # noqa: BLE001 - NVML's errors have no common type that is there without it
        _say_once(str(error))
        return None


@functools.cache
def _has_nvml() -> bool:
    return importlib.util.find_spec("pynvml") is not None


@functools.cache
def _say_once(reason: str) -> None:
    get_logger(__name__).warning("GPU utilisation is not known: %s", reason)
