"""What this machine is and can reach at best: every share in the other sections is of these figures."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist

from sections.gpu.jobs import Job, Setting, Values
from sections.gpu.timing import GIB, MIB, copy_gb_per_s, host_ms, matmul_tflops, median_ms

_PACKAGES = ("torch", "triton", "deepspeed", "mmdet", "mmcv-lite", "flash-attn", "flash-attn-4", "timm")


def jobs(setting: Setting) -> list[Job]:
    """The machine, then copies, products, launches, links and one rank's collectives."""
    device = setting.device
    size = setting.size(8192, 64)
    return [
        Job("what it is", lambda: _describe(device)),
        Job("copy of 1 GiB", lambda: {"GB/s": copy_gb_per_s(device, setting.size(GIB, MIB))}),
        Job("product 8192^3, bf16", lambda: {"TFLOP/s": matmul_tflops(device, size, torch.bfloat16)}),
        Job("product 8192^3, fp32 as torch sets it", lambda: {"TFLOP/s": matmul_tflops(device, size, torch.float32)}),
        Job("product 8192^3, TF32", lambda: _tf32(device, size)),
        Job("a launch", lambda: _launch(device)),
        Job("pinned memory", lambda: _pinned(device, setting.size(GIB, MIB))),
        Job("collectives of one rank", lambda: _collectives(device, setting.size(64 * MIB, MIB // 16))),
    ]


def _describe(device: torch.device) -> Values:
    values: Values = {"python": platform.python_version(), "cores": os.cpu_count()}
    for package in _PACKAGES:
        try:
            values[package] = version(package)
        except PackageNotFoundError:
            values[package] = "not installed"
    if device.type != "cuda":
        return values | {"device": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    cuda = {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "GiB": round(properties.total_memory / GIB, 1),
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        "clocks": _clocks(),
    }
    return values | cuda


def _clocks() -> str:
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi"
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return (done.stdout or done.stderr).strip()


def _tf32(device: torch.device, size: int) -> Values:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return {"TFLOP/s": matmul_tflops(device, size, torch.float32)}
    finally:
        torch.set_float32_matmul_precision(before)


def _launch(device: torch.device) -> Values:
    x = torch.zeros(1, device=device)
    return {"host us": host_ms(lambda: x.add_(1), device, 2000) * 1e3, "device us": median_ms(x.zero_, device) * 1e3}


def _pinned(device: torch.device, num_bytes: int) -> Values:
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(pinned, device=device)
    to_device = median_ms(lambda: there.copy_(pinned, non_blocking=True), device)
    to_host = median_ms(lambda: pinned.copy_(there, non_blocking=True), device)
    return {"to the device, GB/s": num_bytes / to_device / 1e6, "back, GB/s": num_bytes / to_host / 1e6}


def _collectives(device: torch.device, elements: int) -> Values:
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    whole, part = (torch.zeros(elements, device=device, dtype=torch.bfloat16) for _ in range(2))
    calls: dict[str, Any] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
    }
    try:
        return {f"{name}, ms": median_ms(call, device) for name, call in calls.items()}
    finally:
        dist.destroy_process_group()
