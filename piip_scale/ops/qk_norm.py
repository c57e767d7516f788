"""Queries, keys and values out of one projection, queries and keys normalised: torch's operators, and a kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from piip_scale.ops.fused import check_triton_cache, uses_triton


def qk_rms_norm(
    qkv_BLC: Tensor, query_norm: nn.RMSNorm, key_norm: nn.RMSNorm, kernel: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a projection in three, with an RMS norm of queries and of keys over the whole width, all heads together.

    Args:
        qkv_BLC: Queries, keys and values side by side (B, L, 3 * dim).
        query_norm: Over ``dim``, with a scale; must be called inside the unit that owns both norms.
        key_norm: Of the same epsilon.
        kernel: ``plain``, ``triton`` or ``auto``. The kernel keeps its input and a number a row for the backward pass,
            and writes the gradients of all three side by side as it computes them.

    Returns:
        Queries, keys and values, (B, L, dim) each; values are a view.

    Raises:
        KernelError: The kernel named cannot serve these tensors on this machine.
    """
    if uses_triton(kernel, qkv_BLC, query_norm.weight, key_norm.weight):
        check_triton_cache()
        from piip_scale.ops.qk_norm_triton import qk_rms_norm_triton

        eps = query_norm.eps or torch.finfo(qkv_BLC.dtype).eps
        return qk_rms_norm_triton(qkv_BLC, query_norm.weight, key_norm.weight, eps)
    query, key, value = qkv_BLC.chunk(3, dim=-1)
    return query_norm(query), key_norm(key), value
