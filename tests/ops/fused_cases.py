"""Cases of test_triton_kernels for the fused kernels, run in a process of their own."""

import pytest
import torch
from torch import Tensor, nn

from piip_scale.errors import KernelError
from piip_scale.ops.gelu import linear_gelu
from piip_scale.ops.group_norm import group_norm
from piip_scale.ops.merge_map import add_resized
from piip_scale.ops.qk_norm import qk_rms_norm
from piip_scale.ops.residual import Paths, add_residual

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def check_twins(run, tensors: list[Tensor], tolerance: float) -> None:
    """Output and gradients of ``run(*tensors, kernel=...)``, of the kernel and of the plain formula in float64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output, expected = run(*tensors, kernel="triton"), run(*wide, kernel="plain")
    cotangent = draw(*expected.shape, dtype=output.dtype, seed=9).detach()
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
    ours = torch.autograd.grad(output, tensors, cotangent)
    assert [grad.dtype for grad in ours] == [tensor.dtype for tensor in tensors]
    for grad, truth in zip(ours, torch.autograd.grad(expected, wide, cotangent.double()), strict=True):
        # Gradients of parameters are sums over many rows.
        bound = tolerance * max(1.0, truth.abs().max().item())
        torch.testing.assert_close(grad.double(), truth, atol=bound, rtol=tolerance)


PATHS = {
    "all": None,
    "mask": lambda: Paths(0.5, mask_B=torch.tensor([1.0, 0.0, 1.0], device=DEVICE)),
    "index": lambda: Paths(2 / 3, index_K=torch.tensor([2, 0], device=DEVICE)),
}


@pytest.mark.parametrize(("scaled", "dtype"), [(True, torch.float32), (True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("paths", PATHS)
def test_residuals(dtype, paths, scaled):
    chosen = PATHS[paths]() if PATHS[paths] else None
    # Two tiles of columns, the second cut off, and more rows than one program of the backward pass takes.
    kept = 2 if paths == "index" else 3
    tensors = [draw(3, 5, 3, 260, dtype=dtype), draw(kept, 5, 3, 260, dtype=dtype, seed=1)]
    tensors += [draw(260, dtype=dtype, seed=2)] * scaled

    def run(x, residual, gamma=None, *, kernel):
        return add_residual(x, residual, gamma, chosen, kernel)

    check_twins(run, tensors, DTYPES[dtype])


def test_a_dropped_residual_is_not_read():
    x, residual = torch.ones(2, 3, 4, device=DEVICE), torch.full((2, 3, 4), float("nan"), device=DEVICE)
    paths = Paths(0.5, mask_B=torch.zeros(2, device=DEVICE))
    assert torch.equal(add_residual(x, residual, None, paths, "triton"), x)


def test_a_frozen_scale_gets_no_gradient():
    x, residual = draw(2, 3, 8), draw(2, 3, 8, seed=1)
    gamma = draw(8, seed=2).detach()
    add_residual(x, residual, gamma, None, "triton").sum().backward()
    torch.testing.assert_close(residual.grad, gamma.expand(2, 3, 8))
    assert torch.equal(x.grad, torch.ones_like(x))


def test_tensors_of_several_dtypes_are_refused():
    with pytest.raises(KernelError, match=r"tensors of one dtype: got 'torch.float32, torch.bfloat16"):
        add_residual(draw(1, 8), draw(1, 8, dtype=torch.bfloat16), draw(8), None, "triton")


@pytest.mark.parametrize(
    ("activation", "width", "dtype"),
    [
        ("none", 40, torch.float32),
        # Two blocks of columns, and a group across their border.
        ("relu", 264, torch.bfloat16),
        ("gelu", 40, torch.float32),
        ("gelu", 40, torch.bfloat16),
    ],
)
def test_group_norms(activation, width, dtype):
    # More rows than one program sums, far from zero.
    tensors = [draw(2, width, 11, 6, dtype=dtype), draw(width, dtype=dtype, seed=1), draw(width, dtype=dtype, seed=2)]
    tensors[0] = (tensors[0].detach() + 3).requires_grad_()

    def run(x, gamma, beta, *, kernel):
        return group_norm(x, 8, gamma, beta, 1e-5, activation, kernel)

    check_twins(run, tensors, DTYPES[dtype])


def test_a_group_norms_output_has_its_channels_together():
    output = group_norm(draw(1, 8, 3, 5), 2, draw(8), draw(8), 1e-5, "relu", "triton")
    assert output.permute(0, 2, 3, 1).is_contiguous()


def test_a_group_norm_far_from_zero_keeps_its_digits():
    # In float32 the square of 1,000 leaves no digit of a variance of 1e-2.
    x = (1000 + 0.1 * draw(1, 4, 16, 16).detach()).requires_grad_()
    ones, zeros = torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    output = group_norm(x, 2, ones, zeros, 0.0, "none", "triton")
    expected = group_norm(x.double(), 2, ones.double(), zeros.double(), 0.0, "none", "plain")
    torch.testing.assert_close(output.double(), expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("grid", "begins", "dtype"),
    [
        ((2, 5), True, torch.float32),
        ((5, 3), False, torch.bfloat16),
        ((4, 7), False, torch.float32),
        ((9, 10), True, torch.float32),
    ],
)
def test_resized_sums(grid, begins, dtype):
    """From smaller, equal and larger grids; both axes by factors of their own."""
    tensors = [draw(2, 20, *grid, dtype=dtype), draw(1, dtype=dtype, seed=1)]
    tensors += [] if begins else [draw(2, 20, 4, 7, seed=2)]

    def run(source, weight, total=None, *, kernel):
        return add_resized(total, source, weight, 4, 7, kernel)

    # The sum is float32 whatever the map is: only gradients of the map are rounded.
    check_twins(run, tensors, DTYPES[dtype])


# A block of columns that is cut off, and more rows than one program of the backward pass takes.
@pytest.mark.parametrize(("width", "dtype"), [(40, torch.float32), (264, torch.bfloat16), (100, torch.bfloat16)])
def test_norms_of_queries_and_keys(width, dtype):
    tensors = [draw(2, 11, 3 * width, dtype=dtype), *(draw(width, dtype=dtype, seed=seed) for seed in (1, 2))]

    def run(qkv, *gammas, kernel):
        norms = [nn.RMSNorm(width, eps=1e-6) for _ in gammas]
        for norm, gamma in zip(norms, gammas, strict=True):
            del norm.weight
            norm.weight = gamma
        return torch.cat(qk_rms_norm(qkv, *norms, kernel), -1)

    check_twins(run, tensors, DTYPES[dtype])


def test_frozen_norms_of_queries_and_keys_get_no_gradient_and_values_are_a_view():
    norms = [nn.RMSNorm(8, eps=1e-6, device=DEVICE).requires_grad_(False) for _ in range(2)]
    qkv = draw(1, 3, 24)
    value = qk_rms_norm(qkv, *norms, "triton")[2]
    assert value.data_ptr() == qkv[..., 16:].data_ptr()
    value.sum().backward()
    assert torch.equal(qkv.grad, torch.cat((torch.zeros(1, 3, 16), torch.ones(1, 3, 8)), -1).to(DEVICE))


@pytest.mark.parametrize(("width", "dtype"), [(40, torch.float32), (264, torch.bfloat16)])
def test_linear_layers_with_gelu(width, dtype):
    tensors = [draw(3, 37, 24, dtype=dtype), draw(width, 24, dtype=dtype, seed=1), draw(width, dtype=dtype, seed=2)]
    check_twins(linear_gelu, tensors, DTYPES[dtype])


def test_a_frozen_bias_before_gelu_gets_no_gradient():
    x, weight, bias = draw(5, 8), draw(16, 8, seed=1), draw(16, seed=2).detach()
    output = linear_gelu(x, weight, bias, kernel="triton")
    expected = linear_gelu(x, weight, bias, kernel="plain")
    ours, theirs = (torch.autograd.grad(y.sum(), (x, weight)) for y in (output, expected))
    torch.testing.assert_close(ours, theirs)
