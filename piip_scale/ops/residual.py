"""Adding a residual to its input with a scale per channel and stochastic depth: a plain formula, and a kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from piip_scale.ops.fused import check_triton_cache, uses_triton


@dataclass(frozen=True)
class Paths:
    """Which samples of a batch get their residual, and how much of it.

    Attributes:
        share: The share that gets it; residuals are divided by it. A number, or as an input of a compiled program a
            tensor without axes.
        mask_B: 1 for a sample that gets it and 0 for others, in the input's dtype.
        index_K: Instead of the mask: the samples whose residual was computed at all, in its order, int64.
    """

    share: float | Tensor
    mask_B: Tensor | None = None
    index_K: Tensor | None = None

    def as_input(self) -> Paths:
        """The same for a compiled program, which would be built anew for each number."""
        return replace(self, share=torch.tensor(self.share, dtype=torch.float64, device="cpu"))


def add_residual(
    x: Tensor, residual: Tensor, gamma_C: Tensor | None = None, paths: Paths | None = None, kernel: str = "auto"
) -> Tensor:
    """``x + gamma * residual``, for the samples that get it.

    Args:
        x: (B, ..., C).
        residual: The same shape, or (K, ..., C) for the samples that ``paths`` names.
        gamma_C: Scale per channel; must be called inside the module that owns it.
        paths: Stochastic depth; ``None`` gives every sample its whole residual.
        kernel: ``plain``, ``triton`` or ``auto``. The kernel rounds once, the plain formula after each step.

    Returns:
        Of the shape of ``x``.

    Raises:
        KernelError: The kernel named cannot serve these tensors on this machine.
    """
    tensors = (x, residual) if gamma_C is None else (x, residual, gamma_C)
    # A plain sum is one kernel already.
    if (gamma_C is not None or paths is not None) and uses_triton(kernel, *tensors):
        check_triton_cache()
        from piip_scale.ops.residual_triton import add_residual_triton

        return add_residual_triton(x, residual, gamma_C, paths)
    return add_residual_plain(x, residual, gamma_C, paths)


def add_residual_plain(x: Tensor, residual: Tensor, gamma_C: Tensor | None, paths: Paths | None) -> Tensor:
    """``add_residual`` by torch's operators."""
    scaled = residual if gamma_C is None else residual * gamma_C
    if paths is None:
        return x + scaled
    if paths.index_K is not None:
        return torch.index_add(x, 0, paths.index_K, scaled / paths.share)
    assert paths.mask_B is not None
    mask = paths.mask_B.view(-1, *(1,) * (x.ndim - 1))
    return x + scaled * mask / paths.share
