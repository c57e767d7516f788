"""How much memory this process uses."""

from __future__ import annotations

import resource
import sys

import psutil
import torch

# Linux counts the peak in KiB, macOS in bytes.
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024

GIB = 1 << 30


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """The most memory used so far: what torch allocated on a CUDA ``device``, else this process's resident memory."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT


def current_memory_bytes(device: torch.device | None = None) -> int:
    """The memory used now, of the same kind as ``peak_memory_bytes``."""
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
