"""The Triton kernels: interpreted on a CPU, run on a GPU where there is one, and compiled for one that is not there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
CASES = Path(__file__).parent / "triton_cases.py"

# heads, channels: the large and the small side of PIIP-H6B, PIIP-TSB and PIIP-SBL, DINO's decoder.
COMPILE = """
import json, os, re, subprocess, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from piip_scale.ops import deform_attention_triton as module

BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
halves = dict.fromkeys(("value", "output", "grad_output"), "*bf16")
floats = dict.fromkeys(("locations", "weights", "grad_value", "grad_locations", "grad_weights"), "*fp32")
for heads, channels in ((16, 100), (16, 40), (6, 24), (16, 64), (8, 32)):
    constants = module.layout(heads, channels, points=4)
    types = halves | floats | dict.fromkeys(constants, "constexpr")
    for kernel in (module._forward_kernel, module._backward_kernel):
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        # As torch's allocator gives them.
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        with open("kernel.cubin", "wb") as file:
            file.write(compiled.asm["cubin"])
        usage = subprocess.run(
            [os.path.join(BIN, "cuobjdump"), "-res-usage", "kernel.cubin"], capture_output=True, text=True, check=True
        ).stdout
        print(json.dumps({
            "kernel": kernel.__name__,
            "channels": channels,
            "registers": int(re.search(r"REG:(\\d+)", usage)[1]),
            "stack": int(re.search(r"STACK:(\\d+)", usage)[1]),
            "ptx": compiled.asm["ptx"],
        }))
"""


def run(*arguments: str | Path, **environment: str) -> str:
    # A process of its own: triton reads TRITON_INTERPRET when it is first imported, by whomever.
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    folder = environment.get("TRITON_HOME")
    done = subprocess.run(command, env=clean | environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run compiled where there is a CUDA device")
def test_interpreted_kernels_follow_the_reference():
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", CASES, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_kernels_follow_the_reference():
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", CASES)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What Triton makes of the kernels for a Hopper GPU, which need not be here."""
    folder = tmp_path_factory.mktemp("triton")
    (folder / "compile_kernels.py").write_text(COMPILE)
    root = str(CASES.parents[2])
    lines = run(folder / "compile_kernels.py", TRITON_HOME=str(folder), PYTHONPATH=root).splitlines()
    kernels = [json.loads(line) for line in lines]
    assert len(kernels) == 10
    return kernels


def test_nothing_spills(compiled):
    for kernel in compiled:
        name = f"{kernel['kernel']} {kernel['channels']}"
        assert kernel["stack"] == 0, name
        assert "ld.local" not in kernel["ptx"], name
        # 128 let four programs of four warps share a multiprocessor.
        assert kernel["registers"] <= 128, name


def test_atomics_are_wide_and_without_fences(compiled):
    for kernel in compiled:
        atomics = re.findall(r"(?:red|atom)\.global[\w.]*", kernel["ptx"])
        assert bool(atomics) == (kernel["kernel"] == "_backward_kernel")
        assert {atomic for atomic in atomics if ".relaxed." not in atomic or not atomic.endswith("v4.f32")} == set()
        assert not re.search(r"\b(fence|membar)\b", kernel["ptx"])


def test_values_are_read_in_wide_loads(compiled):
    for kernel in compiled:
        widest = 16 if kernel["channels"] % 8 == 0 else 8
        name = f"ld.global.v{widest // 4}.b32"
        # Two a corner or one, for a program's queries in one or two rounds.
        assert len(re.findall(re.escape(name), kernel["ptx"])) >= 4, kernel["channels"]
        assert not re.search(r"ld\.global\.b16|ld\.global\.b8", kernel["ptx"]), kernel["channels"]
