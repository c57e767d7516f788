"""Is it right here: every kernel at real shapes against float64, forward and backward; the tests that need a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from piip_scale.ops.attention import attention
from piip_scale.ops.deform_attention import deform_attention
from sections.gpu.fused import FUSED, FusedCase
from sections.gpu.jobs import Job, Setting, Values
from sections.gpu.shapes import ATTENTION, DEFORM, Attend, AttentionShape, DeformShape, attention_backends

ROOT = Path(__file__).parents[3]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TESTS_LIMIT_S = 150


def jobs(setting: Setting) -> list[Job]:
    """Kernels first, since the tests take longest."""
    found = [
        Job(f"attention {backend}, {shape.name}, {name}", partial(_attention, setting, attend, shape, dtype))
        for shape in ATTENTION
        for backend, attend in attention_backends(setting).items()
        for name, dtype in _DTYPES.items()
    ]
    deform = [
        Job(f"deformable {kernel}, {shape.name}, {name}", partial(_deform, setting, kernel, shape, dtype))
        for shape in DEFORM
        for kernel in ("triton", "reference")
        if kernel == "reference" or setting.device.type == "cuda"
        for name, dtype in _DTYPES.items()
    ]
    fused = [
        Job(f"{case.name}, {kernel}, {name}", partial(_fused, setting, kernel, case, dtype))
        for case in FUSED
        for kernel in case.kernels(setting)
        for name, dtype in _DTYPES.items()
    ]
    return [*deform, *fused, *found, Job("tests marked gpu", partial(_tests, setting))]


def _tests(setting: Setting) -> Values:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider"]
    command += ["--collect-only", "tests/ops/test_attention.py"] if setting.rehearse else ["tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_TESTS_LIMIT_S, check=False)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {"exit code": done.returncode, "result": done.stdout.strip().splitlines()[-1:], "failed": failed}


def _attention(setting: Setting, attend: Attend, shape: AttentionShape, dtype: torch.dtype) -> Values:
    (query, key, value), bias = shape.tensors(setting, dtype)
    parts = (query, key, value)
    wide = [part.detach().double().requires_grad_() for part in parts]
    wide_bias = None if bias is None else bias.double()

    def exact() -> Tensor:
        return attention(wide[0], wide[1], wide[2], wide_bias, kernel="math")

    return _errors(lambda: attend(query, key, value, bias), parts, exact, wide, ("q", "k", "v"))


def _deform(setting: Setting, kernel: str, shape: DeformShape, dtype: torch.dtype) -> Values:
    parts = shape.tensors(setting, dtype)
    wide = [part.detach().double().requires_grad_() for part in parts]
    names = ("values", "locations", "weights")

    def run() -> Tensor:
        return deform_attention(parts[0], parts[1], parts[2], kernel)

    return _errors(run, parts, lambda: deform_attention(wide[0], wide[1], wide[2]), wide, names)


def _fused(setting: Setting, kernel: str, case: FusedCase, dtype: torch.dtype) -> Values:
    parts = case.tensors(setting, dtype)
    wide = [part.detach().double().requires_grad_() for part in parts]
    names = [f"input {index}" for index in range(len(parts))]
    return _errors(lambda: case.call(parts, kernel), parts, lambda: case.call(wide, "plain"), wide, names)


def _errors(
    run: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    exact: Callable[[], Tensor],
    wide: Sequence[Tensor],
    names: Sequence[str],
) -> Values:
    """The largest difference from float64, as a share of the largest value, of the output and of each gradient."""
    expected = exact()
    cotangent = torch.randn(expected.shape, device=expected.device, generator=_generator(expected.device))
    output = run()
    ours = torch.autograd.grad(output, inputs, cotangent.to(output.dtype))
    # Of the rounded cotangent: what rounds it is not the kernel's.
    truth = torch.autograd.grad(expected, wide, cotangent.to(output.dtype).double())
    errors = {"output": _share(output, expected)}
    errors |= {f"grad {name}": _share(a, b) for name, a, b in zip(names, ours, truth, strict=True)}
    # Of the narrowest: a float32 output has bf16 gradients where its inputs are bf16.
    is_narrow = torch.bfloat16 in (output.dtype, *(tensor.dtype for tensor in inputs))
    bound = 2e-2 if is_narrow else 2e-3 if output.is_cuda else 1e-4
    return {name: f"{error:.1e}" for name, error in errors.items()} | {"right": max(errors.values()) < bound}


def _share(ours: Tensor, truth: Tensor) -> float:
    # A value that is not finite compares as wrong, never as right.
    difference = (ours.detach().double() - truth.detach()).abs().max() / truth.detach().abs().max()
    return float(difference) if torch.isfinite(difference) else float("inf")


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(1)
