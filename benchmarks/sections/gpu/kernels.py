"""How fast is each kernel at the shapes of the networks, and what share is that of what this GPU can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from piip_scale.ops.deform_attention import deform_attention
from sections.gpu.fused import FUSED, FusedCase
from sections.gpu.jobs import Job, Setting, Values
from sections.gpu.shapes import ATTENTION, DEFORM, Attend, AttentionShape, DeformShape, attention_backends
from sections.gpu.timing import GIB, MIB, copy_gb_per_s, first_ms, host_ms, matmul_tflops, median_ms
from sections.windowed_blocks import PreparedBlock, WindowedBlock

_BF16 = torch.bfloat16
_BACKWARD_OVER_FORWARD = 2.5
"""Products of attention's backward pass, recomputed scores included, over those of its forward pass."""


def jobs(setting: Setting) -> list[Job]:
    """Deformable attention, all that is fused, old and new, blocks with windows, every attention, new shapes' costs."""
    ceilings = _Ceilings(setting)
    deform = [
        Job(f"deformable {kernel}, {shape.name}", partial(_deform, setting, ceilings, kernel, shape))
        for shape in DEFORM
        for kernel in ("triton", "reference")
        if kernel == "reference" or setting.device.type == "cuda"
    ]
    found = [
        Job(f"attention {backend}, {shape.name}", partial(_attention, setting, ceilings, attend, shape))
        for shape in ATTENTION
        for backend, attend in attention_backends(setting).items()
    ]
    fused = [
        Job(f"{case.name}, {kernel}", partial(_fused, setting, ceilings, kernel, case))
        for case in FUSED
        for kernel in case.kernels(setting)
    ]
    blocks = [Job(f"block of ViT-S, {case}", partial(_block, setting, case)) for case in _blocks(setting)]
    return [*deform, *fused, *blocks, *found]


def _blocks(setting: Setting) -> list[WindowedBlock]:
    """Full attention and windows, without and with rotary positions, and a grid that windows do not divide."""
    grids = [(setting.size(64, 8),) * 2, (setting.size(50, 5), setting.size(37, 7))]
    windows = (0, setting.size(14, 3), setting.size(16, 4))
    return [WindowedBlock(grid, window, rotary) for grid in grids for window in windows for rotary in (False, True)]


class _Ceilings:
    """Measured once, in the process that measures the kernels."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._tflops = self._gb_per_s = 0.0

    @property
    def tflops(self) -> float:
        """Of a large product in bf16."""
        self._tflops = self._tflops or matmul_tflops(self._setting.device, self._setting.size(8192, 64), _BF16)
        return self._tflops

    @property
    def gb_per_s(self) -> float:
        """Of a copy."""
        self._gb_per_s = self._gb_per_s or copy_gb_per_s(self._setting.device, self._setting.size(GIB, MIB))
        return self._gb_per_s


def _deform(setting: Setting, ceilings: _Ceilings, kernel: str, shape: DeformShape) -> Values:
    parts = shape.tensors(setting, _BF16)
    value, looks, weights = parts
    first = first_ms(lambda: deform_attention(value, looks, weights, kernel), setting.device)
    forward, backward = _passes(lambda: deform_attention(value, looks, weights, kernel), parts, setting)
    gb_per_s = shape.traffic_bytes(_BF16.itemsize) / forward / 1e6
    return {
        "forward ms": forward,
        "backward ms": backward,
        "both ms": forward + backward,
        "forward GB/s": gb_per_s,
        "of a copy": gb_per_s / ceilings.gb_per_s,
        "first call ms": first,
    }


def _fused(setting: Setting, ceilings: _Ceilings, kernel: str, case: FusedCase) -> Values:
    tensors = case.tensors(setting, _BF16)
    first = first_ms(lambda: case.call(tensors, kernel), setting.device)
    spent = _passes(lambda: case.call(tensors, kernel), tensors, setting)
    forward, backward = (moved / ms / 1e6 for moved, ms in zip(case.traffic_bytes(setting, _BF16), spent, strict=True))
    return {
        "forward ms": spent[0],
        "backward ms": spent[1],
        "forward GB/s": forward,
        "backward GB/s": backward,
        "of a copy": forward / ceilings.gb_per_s,
        "host ms": host_ms(lambda: case.call(tensors, kernel), setting.device, setting.size(200, 2)),
        "first call ms": first,
    }


def _attention(setting: Setting, ceilings: _Ceilings, attend: Attend, shape: AttentionShape) -> Values:
    parts, bias = shape.tensors(setting, _BF16)
    query, key, value = parts
    forward, backward = _passes(lambda: attend(query, key, value, bias), parts, setting)
    rate, rate_back = (
        passes * shape.forward_flops / spent / 1e9
        for passes, spent in ((1, forward), (_BACKWARD_OVER_FORWARD, backward))
    )
    flops = shape.forward_flops * (1 + _BACKWARD_OVER_FORWARD)
    # Images of many sizes: a kernel that plans each shape anew pays this at each.
    (query, key, value), bias = shape.tensors(setting, _BF16, extra_tokens=16)
    first = first_ms(lambda: attend(query, key, value, bias), setting.device)
    return {
        "forward ms": forward,
        "backward ms": backward,
        "forward TFLOP/s": rate,
        "backward TFLOP/s": rate_back,
        "of a product": flops / (forward + backward) / 1e9 / ceilings.tflops,
        "first call of a shape ms": first,
    }


def _block(setting: Setting, case: WindowedBlock) -> Values:
    block = PreparedBlock(case, setting.device, _BF16)
    forward = median_ms(block, setting.device)
    output = block()
    backward = median_ms(lambda: block.backward(output), setting.device)
    return {
        "forward ms": forward,
        "backward ms": backward,
        "both ms": forward + backward,
        "TFLOP/s": 2 * 3 * case.macs() / (forward + backward) / 1e9,
        "host ms": host_ms(block, setting.device, setting.size(200, 2)),
        "kept MiB": case.kept_bytes(_BF16) / MIB,
    }


def _passes(run: Callable[[], Tensor], inputs: Sequence[Tensor], setting: Setting) -> tuple[float, float]:
    forward = median_ms(run, setting.device)
    output = run()
    cotangent = torch.ones_like(output)
    backward = median_ms(lambda: torch.autograd.grad(output, inputs, cotangent, retain_graph=True), setting.device)
    return forward, backward
