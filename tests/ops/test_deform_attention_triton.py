"""The Triton kernels: interpreted on a CPU, run on a GPU where there is one, and compiled for one that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
CASES = Path(__file__).parent / "triton_cases.py"

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from piip_scale.ops import deform_attention_triton as module

dtypes = dict(value="*bf16", output="*bf16", grad_output="*bf16")
floats = ("locations", "weights", "grad_value", "grad_locations", "grad_weights")
constants = dict(NUM_POINTS=4, BLOCK_QUERIES=16, BLOCK_CHANNELS=128)
types = dtypes | dict.fromkeys(floats, "*fp32") | dict.fromkeys(constants, "constexpr")
for kernel in (module._forward_kernel, module._backward_kernel):
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


def run(*arguments: str | Path, **environment: str) -> None:
    # A process of its own: triton reads TRITON_INTERPRET when it is first imported, by whomever.
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run compiled where there is a CUDA device")
def test_interpreted_kernels_follow_the_reference():
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", CASES, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_kernels_follow_the_reference():
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", CASES)


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    run(script, TRITON_HOME=str(tmp_path))
