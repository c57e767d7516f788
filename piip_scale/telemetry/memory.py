"""How much memory this process uses."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

GIB = 1 << 30

_STATUS = Path("/proc/self/status")


def memory_now_bytes(device: torch.device) -> dict[str, int]:
    """What this process holds now, without waiting for the device.

    Returns:
        ``host``, its resident memory, where the system tells it; of a CUDA device ``allocated`` to tensors and
        ``reserved`` by torch's allocator too.
    """
    held = {}
    if device.type == "cuda":
        held["allocated"] = torch.cuda.memory_allocated(device)
        held["reserved"] = torch.cuda.memory_reserved(device)
    resident = _status_bytes("VmRSS")
    return held if resident is None else held | {"host": resident}


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """The most memory used so far: what torch allocated on a CUDA ``device``, else this process's resident memory."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage counts the parent's memory too, from between fork and exec.
    peak = _status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if peak is None else peak


def _status_bytes(field: str) -> int | None:
    """A size of this process that the system knows; ``None`` where it has no such file."""
    found = re.search(rf"{field}:\s*(\d+) kB", _STATUS.read_text()) if _STATUS.is_file() else None
    return int(found[1]) * 1024 if found else None
