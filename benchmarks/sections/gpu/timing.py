"""Time and memory of calls on a device; on a CPU the clock stands in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

MIB, GIB = 2**20, 2**30


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(run: Callable[[], Any], device: torch.device, rounds: int = 20, warm_up: int = 3) -> float:
    """Median time of a call in milliseconds, each between two events of its own.

    A CPU takes a tenth of the rounds: there it is a rehearsal.
    """
    for _ in range(warm_up):
        run()
    if device.type != "cuda":
        return statistics.median(_clocked_ms(run) for _ in range(max(rounds // 10, 1)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return float(statistics.median(begin.elapsed_time(end) for begin, end in events))


def first_ms(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one call in milliseconds with everything that only a first call does."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return (time.perf_counter() - started) * 1e3


def host_ms(run: Callable[[], Any], device: torch.device, rounds: int = 200) -> float:
    """Milliseconds that the host needs to give one call to the device, without waiting for it."""
    run()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(rounds):
        run()
    spent = time.perf_counter() - started
    synchronize(device)
    return spent / rounds * 1e3


def peak_gib(device: torch.device) -> float:
    """The most memory that tensors took since ``reset_peak``."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def reset_peak(device: torch.device) -> None:
    """Forgets the peak and gives cached memory back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def matmul_tflops(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """TFLOP/s of a square product: what arithmetic can reach here."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b, device) / 1e9


def copy_gb_per_s(device: torch.device, num_bytes: int) -> float:
    """GB/s of a copy on the device, reading and writing counted."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / median_ms(lambda: target.copy_(source), device) / 1e6


def _clocked_ms(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3
