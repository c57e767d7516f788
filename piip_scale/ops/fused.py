"""The choice between a step's plain formula and its Triton kernel, for all that is fused around matrix products."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piip_scale.errors import KernelError
from piip_scale.files import named_folder

_FIX = "set fused_kernel to auto or plain"


def uses_triton(name: str, *tensors: Tensor) -> bool:
    """Whether the fused kernel ``name`` means Triton for these tensors.

    Inside code that torch compiles it never does: Inductor fuses the plain formulas itself, and with what is around
    them.

    Args:
        name: ``plain``, ``triton`` or ``auto``.
        *tensors: All of one device; under ``auto`` those of several dtypes take the plain formula.

    Raises:
        KernelError: The kernel named cannot serve these tensors on this machine.
    """
    if torch.compiler.is_compiling():
        return False
    first = tensors[0]
    chosen = resolve_fused_kernel(name, first.device.type, first.dtype) == "triton"
    if not chosen or all(tensor.dtype == first.dtype for tensor in tensors):
        return chosen
    if name == "triton":
        raise KernelError(
            "fused kernel triton needs tensors of one dtype",
            value=", ".join(str(tensor.dtype) for tensor in tensors),
            fix=_FIX,
        )
    return False


@lru_cache(maxsize=64)
def resolve_fused_kernel(name: str, device: str | torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The kernel that ``name`` means for tensors of this device and dtype: ``plain`` or ``triton``.

    Args:
        name: A kernel, or ``auto`` for Triton where it is present.
        device: Where the tensors are.
        dtype: Their dtype.

    Raises:
        KernelError: The kernel named is unknown, not installed, or not for this device and dtype.
    """
    device_type = torch.device(device).type
    if name == "plain":
        return name
    if name == "auto":
        return "triton" if auto_takes_triton(device_type, dtype) else "plain"
    if name != "triton":
        raise KernelError("unknown fused kernel", value=name, rule="one of auto, plain, triton")
    require_fused_kernel(name)
    require_runs_triton("fused kernel triton", device_type, dtype, _FIX)
    return "triton"


def require_fused_kernel(name: str) -> None:
    """Raises a ``KernelError`` where the library of a kernel asked for by name is not installed."""
    if name == "triton":
        require_triton("fused kernel triton", _FIX)


def require_triton(kernel: str, fix: str) -> None:
    """Raises a ``KernelError`` where triton is not installed: ``kernel`` is what needs it, ``fix`` does without."""
    if not has_triton():
        raise KernelError(f"{kernel} needs the package triton", fix=f"install it, or {fix}")


def require_runs_triton(kernel: str, device_type: str, dtype: torch.dtype, fix: str) -> None:
    """Raises a ``KernelError`` where ``kernel``, one of Triton's, does not serve tensors of this device and dtype."""
    if not runs_triton(device_type, dtype):
        raise KernelError(
            f"{kernel} cannot run here",
            value=f"{dtype} on {device_type}",
            rule="it needs float32, float16 or bfloat16 on a CUDA device",
            fix=fix,
        )


def auto_takes_triton(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a kernel of Triton's is the one to take where nobody asks for one."""
    return device_type == "cuda" and dtype != torch.float64 and has_triton()


def runs_triton(device_type: str, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels serve tensors of this device and dtype."""
    # The meta device computes shapes only, as for torch's own operators.
    return dtype != torch.float64 and (device_type in ("cuda", "meta") or os.environ.get("TRITON_INTERPRET") == "1")


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Starts a Triton kernel; where its first argument is on the meta device there is nothing to compute."""
    if not arguments[0].is_meta:
        kernel[grid](*arguments, **constants)


@lru_cache(maxsize=1)
def check_triton_cache() -> None:
    """Triton runs what lies in its cache: a folder named for it must not be one where anybody puts something.

    Raises:
        KernelError: The folder named is not to be trusted.
    """
    if folder := os.environ.get("TRITON_CACHE_DIR"):
        named_folder(Path(folder), KernelError, fix="set TRITON_CACHE_DIR to a folder of your own")


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None
