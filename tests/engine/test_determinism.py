"""The deterministic mode: what it sets, which kernels it lets through, and the same bits from it."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from pyramid_task import PyramidTask, pyramid_config
from ranks import run_ranks, tiny_config
from test_equality import weights_of
from tiny_task import make_batch
from torch.nn import functional

from piip_scale.engine.determinism import apply_determinism, determinism_lines
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.setup import build_engine, build_model
from piip_scale.errors import ConfigError, KernelError
from piip_scale.ops.deform_attention import deform_attention_reference, resolve_deform_kernel, sample_by_gathers

TRAIN = tiny_config(train={"deterministic": True}).train


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    apply_determinism(TRAIN)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_nothing_is_set_unless_asked_for(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    apply_determinism(tiny_config().train)
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_it_sets_torch_cudnn_and_cublas(deterministic):
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_an_environment_that_contradicts_is_one_line(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG: got ':0:0'; cuBLAS is .*; unset the variable"):
        apply_determinism(TRAIN)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_start_report_says_it():
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert "same bits" in determinism_lines(TRAIN, gpu)[0]
    assert "not deterministic: on a GPU" in determinism_lines(tiny_config().train, gpu)[0]
    assert determinism_lines(tiny_config().train, cpu) == []


def test_the_kernel_with_atomics_is_not_chosen_and_refused_by_name(deterministic):
    assert resolve_deform_kernel("auto", "cuda", torch.bfloat16) == "reference"
    with pytest.raises(KernelError, match=r"triton is not deterministic: .*; set deform_kernel to auto or reference"):
        resolve_deform_kernel("triton", "cuda")


def test_a_config_that_asks_for_both_is_refused():
    with pytest.raises(ConfigError, match="deform_kernel='triton', whose backward pass adds gradients with atomics"):
        tiny_config(train={"deterministic": True}, model={"deform_kernel": "triton"})


@pytest.mark.parametrize("side", [(1, 1), (5, 7)])
def test_sampling_by_gathers_is_torchs_own(side):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, *side, dtype=torch.double), torch.rand(2, 11, 4, 2, dtype=torch.double) * 3 - 1.5]
    found, expected = [], []
    for results, sample in (
        (found, sample_by_gathers),
        (expected, lambda maps, grid: functional.grid_sample(maps, grid, "bilinear", "zeros", align_corners=False)),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = sample(*leaves)
        results += [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_reference_samples_so_in_deterministic_mode(deterministic, monkeypatch):
    monkeypatch.setattr(functional, "grid_sample", None)
    value, places, weights = torch.rand(1, 4, 4, 2, 8), torch.rand(1, 3, 2, 4, 2), torch.rand(1, 3, 2, 4)
    assert deform_attention_reference(value, places, weights).shape == (1, 3, 2, 8)


def runs(world, device):
    """Weights after two steps, and their gradients' norms: twice in deterministic mode, and once without."""
    found = []
    for deterministic in (True, True, False):
        config = pyramid_config(train={"deterministic": deterministic})
        torch.use_deterministic_algorithms(deterministic)
        engine, _ = build_engine(build_model(PyramidTask(config, world), 0), config, world)
        norms = [train_step(engine, [make_batch(step, 2)], step, 0, world).grad_norm for step in range(2)]
        found.append((weights_of(engine), norms))
    return found


def test_runs_give_the_same_bits_on_a_cpu_in_either_mode():
    (first, norms), (second, same_norms), (_, plain_norms) = run_ranks(1, runs)[0]
    assert norms == same_norms
    for name, weight in first.items():
        np.testing.assert_array_equal(second[name], weight, err_msg=name)
    # The samples of deformable attention are summed in another order.
    assert plain_norms == pytest.approx(norms, rel=1e-4)
