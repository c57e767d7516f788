"""The Triton kernels: interpreted on a CPU, run on a GPU where there is one, and compiled for one that is not there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import preloaded
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
HERE = Path(__file__).parent
CASES = [HERE / "deform_cases.py", HERE / "fused_cases.py"]


def run(*arguments: str | Path, **environment: str) -> str:
    # A process of its own: triton reads TRITON_INTERPRET when it is first imported, by whomever.
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run compiled where there is a CUDA device")
def test_interpreted_kernels_follow_their_twins():
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", *CASES, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_kernels_follow_their_twins():
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", *CASES)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What Triton makes of the kernels for a Hopper GPU, which need not be here."""
    folder = tmp_path_factory.mktemp("triton")
    root = str(HERE.parents[1])
    environment = os.environ | {"TRITON_HOME": str(folder), "PYTHONPATH": root}
    lines = preloaded.run([HERE / "compile_kernels.py"], env=environment, cwd=folder, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def of(compiled, *families):
    found = [kernel for kernel in compiled if kernel["label"].split()[0] in families]
    assert len({(kernel["kernel"], kernel["label"]) for kernel in found}) >= 2 * len(families)
    return found


def test_nothing_spills(compiled):
    for kernel in compiled:
        name = f"{kernel['kernel']} {kernel['label']}"
        assert kernel["stack"] == 0, name
        assert "ld.local" not in kernel["ptx"], name
        # 128 let four programs of four warps share a multiprocessor.
        assert kernel["registers"] <= 128, name


def test_atomics_are_wide_and_without_fences(compiled):
    for kernel in compiled:
        atomics = re.findall(r"(?:red|atom)\.global[\w.]*", kernel["ptx"])
        assert bool(atomics) == (kernel["kernel"] == "_backward_kernel" and kernel["label"].startswith("deform"))
        assert {atomic for atomic in atomics if ".relaxed." not in atomic or not atomic.endswith("v4.f32")} == set()
        assert not re.search(r"\b(fence|membar)\b", kernel["ptx"])


def test_values_are_read_in_wide_loads(compiled):
    for kernel in of(compiled, "deform"):
        channels = int(kernel["label"].split()[1])
        widest = 16 if channels % 8 == 0 else 8
        name = f"ld.global.v{widest // 4}.b32"
        # Two a corner or one, for a program's queries in one or two rounds.
        assert len(re.findall(re.escape(name), kernel["ptx"])) >= 4, channels
        # Offsets and scores of a query on a grid are single numbers of 2 bytes.
        allowed = 12 if kernel["label"].endswith("grid") else 0
        assert len(re.findall(r"ld\.global\.b(?:16|8)\b", kernel["ptx"])) <= allowed, kernel["label"]


def test_maps_are_read_and_written_in_16_bytes(compiled):
    for kernel in of(compiled, "residual", "norm", "merge", "qk", "gelu"):
        if "join" in kernel["kernel"]:  # sums of parts, a thousandth of a map
            continue
        name = f"{kernel['kernel']} {kernel['label']}"
        assert "ld.global.v4.b32" in kernel["ptx"], name
        sums_only = kernel["kernel"] in ("_sum_kernel", "_grad_sum_kernel")
        assert sums_only or "st.global.v4.b32" in kernel["ptx"], name
        # Of the mask alone, one number for a row, and of a map's weight.
        assert len(re.findall(r"ld\.global\.b16", kernel["ptx"])) <= 2, name
