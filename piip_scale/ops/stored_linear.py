"""Linear layers whose weights are stored in 8 bits: a number for each weight, and a scale for each output channel.

Works on every device: the weights are widened at use, and the products are those of the input's precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from piip_scale.errors import KernelError

_LARGEST = {"int8": 127.0, "fp8": 448.0}
DTYPES = {"int8": torch.int8, "fp8": torch.uint8}
"""What a kind's numbers are held in; 8-bit floats (e4m3) as their bits, which no cast of a model touches."""
_FP8 = torch.float8_e4m3fn


def store(weight_OC: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """A weight in 8 bits.

    Args:
        weight_OC: (O, C), any float dtype, on any device.
        kind: ``int8`` or ``fp8``.

    Returns:
        Its numbers (O, C), and the scales (O) in float32: exact in bfloat16 too, so that they are the same in both.
    """
    wide_OC = weight_OC.detach().float()
    # A channel of zeros has any scale.
    largest_O = wide_OC.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    scale_O = (largest_O / _LARGEST[kind]).to(torch.bfloat16).float().clamp(min=torch.finfo(torch.bfloat16).tiny)
    scaled_OC = (wide_OC / scale_O[:, None]).clamp(-_LARGEST[kind], _LARGEST[kind])
    if kind == "int8":
        return scaled_OC.round().to(torch.int8), scale_O
    return scaled_OC.to(_FP8).view(torch.uint8), scale_O


def stored_linear(x: Tensor, weight_OC: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """A linear layer of a stored weight, which like scales and bias has no gradient.

    Args:
        x: (..., C), any float dtype.
        weight_OC: (O, C), from ``store``.
        scale_O: (O).
        bias_O: (O), or none.

    Returns:
        (..., O) in the input's dtype.
    """
    output: Tensor = _StoredLinear.apply(x, weight_OC, scale_O)
    return output if bias_O is None else output + bias_O


def require_stored(kind: str, device: torch.device) -> None:
    """Raises a ``KernelError`` where a device cannot widen weights of a kind."""
    try:
        _widened(torch.zeros(1, dtype=DTYPES[kind], device=device), torch.bfloat16)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise KernelError(
            f"frozen_dtype={kind!r} does not work on {device}",
            value=str(error).splitlines()[0],
            rule="the device must turn such numbers into bfloat16",
            fix="set frozen_dtype to int8, or leave it out",
        ) from error


class _StoredLinear(torch.autograd.Function):
    """Keeps the stored weight for the backward pass, never the widened one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OC: Tensor, scale_O: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OC, scale_O)
        return functional.linear(x, _widened(weight_OC, x.dtype)) * scale_O.to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight_OC, scale_O = ctx.saved_tensors
        return (gradient * scale_O.to(gradient.dtype)) @ _widened(weight_OC, gradient.dtype), None, None


def _widened(weight_OC: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight_OC if weight_OC.dtype == torch.int8 else weight_OC.view(_FP8)).to(dtype)
