"""Group norm with the activation behind it, on maps whose channels lie together: a plain formula, and a kernel."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from piip_scale.errors import KernelError
from piip_scale.ops.fused import check_triton_cache, uses_triton

ACTIVATIONS = ("none", "relu", "gelu")


def group_norm(
    map_BCHW: Tensor,
    num_groups: int,
    gamma_C: Tensor,
    beta_C: Tensor,
    eps: float,
    activation: str = "none",
    kernel: str = "auto",
) -> Tensor:
    """The norm over each group of channels of a sample, scaled, shifted and activated.

    torch's own turns maps whose channels lie together into ones whose rows do, on a GPU: what follows turns them back.

    Args:
        map_BCHW: (B, C, H, W).
        num_groups: Groups, which divide C.
        gamma_C: Scale; must be called inside the module that owns it.
        beta_C: Shift, likewise.
        eps: Added to the variance.
        activation: ``none``, ``relu`` or ``gelu`` (exact).
        kernel: ``plain``, ``triton`` or ``auto``. The kernel keeps its input alone for the backward pass.

    Returns:
        Of the same shape; the kernel's with its channels together.

    Raises:
        KernelError: The kernel or activation named is unknown, or the kernel cannot serve these tensors here.
    """
    if activation not in ACTIVATIONS:
        raise KernelError("unknown activation", value=activation, rule=f"one of {', '.join(ACTIVATIONS)}")
    if uses_triton(kernel, map_BCHW, gamma_C, beta_C):
        check_triton_cache()
        from piip_scale.ops.group_norm_triton import group_norm_triton

        map_BHWC = group_norm_triton(map_BCHW.permute(0, 2, 3, 1), num_groups, gamma_C, beta_C, eps, activation)
        return map_BHWC.permute(0, 3, 1, 2)
    normed_BCHW = functional.group_norm(map_BCHW, num_groups, gamma_C, beta_C, eps)
    return activate(normed_BCHW, activation)


def activate(x: Tensor, activation: str) -> Tensor:
    """An activation by its name."""
    if activation == "relu":
        return functional.relu(x)
    return functional.gelu(x) if activation == "gelu" else x
