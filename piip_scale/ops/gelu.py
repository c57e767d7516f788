"""A linear layer with GELU behind it: torch's formula, and a kernel that sums the bias's gradient in GELU's pass."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from piip_scale.ops.fused import check_triton_cache, uses_triton


def linear_gelu(x: Tensor, weight_OC: Tensor, bias_O: Tensor, kernel: str = "auto") -> Tensor:
    """``gelu(linear(x, weight, bias))``, exact.

    The product adds the bias itself on a GPU, which moves no bytes: a kernel has nothing to gain there. The gradient of
    the bias however is a sum over all that GELU's backward pass writes, which torch reads once more for it.

    Args:
        x: (..., C).
        weight_OC: (O, C); must be called inside the module that owns it.
        bias_O: (O), likewise.
        kernel: ``plain``, ``triton`` or ``auto``.

    Returns:
        (..., O).

    Raises:
        KernelError: The kernel named cannot serve these tensors on this machine.
    """
    if uses_triton(kernel, x, weight_OC, bias_O):
        check_triton_cache()
        from piip_scale.ops.gelu_triton import gelu_of_biased_triton

        return gelu_of_biased_triton(functional.linear(x, weight_OC, bias_O.detach()), bias_O)
    return functional.gelu(functional.linear(x, weight_OC, bias_O))
