"""The kernels that a training computes with: chosen before its first step, the same on every rank, and reported."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from piip_scale.agreement import on_main
from piip_scale.config.branches import BranchConfig, VitBranchConfig
from piip_scale.config.run import RunConfig
from piip_scale.geometry import block_windows
from piip_scale.ops.attention import prefer_attention_kernel, resolve_attention
from piip_scale.ops.attention_order import AttentionShape, measure_attention
from piip_scale.ops.deform_attention import resolve_deform_kernel
from piip_scale.ops.fused import resolve_fused_kernel
from piip_scale.ops.stored_linear import require_stored

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_kernels(config: RunConfig, device: torch.device) -> list[str]:
    """Lines of the start report: every branch's kernels. Collective where attention is measured.

    Where ``attention_kernel="auto"`` and several kernels could serve a branch, rank 0 measures them at the branch's
    nominal size and micro-batch, and every rank takes the fastest.

    Args:
        config: The run.
        device: This rank's.

    Raises:
        KernelError: The device cannot compute with weights stored as a branch's ``frozen_dtype`` says.
    """
    lines = []
    for index, branch in enumerate(config.model.branches):
        for shape in attention_shapes(branch, config):
            lines.append(f"branch {index}: {_attention_line(config, shape, device)}")
        if isinstance(branch, VitBranchConfig) and branch.frozen_dtype != "run":
            require_stored(branch.frozen_dtype, device)
            lines.append(f"branch {index}: frozen weights in {branch.frozen_dtype}")
    dtype, model = _DTYPES[config.train.precision], config.model
    fused = f"between products: {resolve_fused_kernel(model.fused_kernel, device, dtype)}"
    if len(model.branches) > 1 and model.interaction.attention == "deform":
        fused = f"deformable attention: {resolve_deform_kernel(model.deform_kernel, device, dtype)}; {fused}"
    return [*lines, fused]


def attention_shapes(branch: BranchConfig, config: RunConfig) -> Iterator[AttentionShape]:
    """The different attentions of a branch's blocks at its nominal resolution; none of a ConvNeXt."""
    if not isinstance(branch, VitBranchConfig):
        return
    side = branch.resolution_px // branch.patch_size_px
    dtype, images = _DTYPES[config.train.precision], config.data.micro_batch_size
    for window in sorted(set(block_windows(branch.window_size_tokens, branch.depth))):
        batch, tokens = images, side**2 + branch.class_token
        if window:
            batch, tokens = images * (-(-side // window)) ** 2, window**2
        size = branch.embed_dim // branch.num_heads
        yield AttentionShape(batch, branch.num_heads, tokens, size, branch.relative_position_bias, dtype)


def _attention_line(config: RunConfig, shape: AttentionShape, device: torch.device) -> str:
    name = config.model.attention_kernel
    measured: dict[str, float] = {}
    if name == "auto" and device.type == "cuda":
        measured = on_main(lambda: measure_attention(shape, device))
        if measured:
            prefer_attention_kernel(shape.size, shape.tokens, shape.biased, next(iter(measured)))
    chosen = resolve_attention(name, device.type, shape.dtype, shape.size, shape.tokens, shape.biased)
    order = ", ".join(f"{kernel} {ms:.2f} ms" for kernel, ms in measured.items())
    bias = " with bias" if shape.biased else ""
    where = f"heads of {shape.size}, {shape.tokens:,} tokens{bias}"
    return f"attention: {chosen} ({where}{f'; measured {order}' if order else ''})"
