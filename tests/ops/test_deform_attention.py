import math

import pytest
import torch
from torch import Tensor

from piip_scale.errors import KernelError
from piip_scale.ops.deform_attention import deform_attention, resolve_deform_kernel


def slow_deform_attention(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Every sample on its own: the four cells around it, weighted by the area of the opposite rectangle."""
    batch, height, width, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[3]
    output = value.new_zeros(batch, queries, heads, channels)
    index = torch.cartesian_prod(*(torch.arange(n) for n in (batch, queries, heads, points))).tolist()
    for b, q, h, p in index:
        x, y = locations[b, q, h, p, 0] * width - 0.5, locations[b, q, h, p, 1] * height - 0.5
        left, top = math.floor(x.item()), math.floor(y.item())
        for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            if 0 <= row < height and 0 <= column < width:
                area = (1 - (x - column).abs()) * (1 - (y - row).abs())
                output[b, q, h] = output[b, q, h] + weights[b, q, h, p] * area * value[b, row, column, h]
    return output


def inputs(seed: int = 0, reach: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Values on a 4 x 3 grid, 5 queries whose locations leave the map on every side, softmaxed weights."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(2, 4, 3, 2, 3, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, 5, 2, 4, 2, generator=generator, dtype=torch.float64) * (1 + 2 * reach) - reach
    weights = torch.randn(2, 5, 2, 4, generator=generator, dtype=torch.float64).softmax(-1)
    return value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_()


@pytest.mark.parametrize("seed", range(3))
def test_reference_follows_the_slow_one_forward_and_backward(seed):
    tensors = inputs(seed)
    expected = slow_deform_attention(*tensors)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    output = deform_attention(*tensors, kernel="reference")
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        torch.autograd.grad(output, tensors, cotangent),
        torch.autograd.grad(expected, tensors, cotangent),
        atol=1e-10,
        rtol=0,
    )


def test_reference_passes_gradcheck():
    assert torch.autograd.gradcheck(lambda *tensors: deform_attention(*tensors, kernel="reference"), inputs(4))


def test_looking_at_a_cell_centre_returns_that_cell():
    value = torch.arange(12.0).view(1, 4, 3, 1, 1)
    locations = torch.tensor([(2 + 0.5) / 3, (1 + 0.5) / 4]).view(1, 1, 1, 1, 2)
    assert deform_attention(value, locations, torch.ones(1, 1, 1, 1)).item() == pytest.approx(5.0)


def test_outside_the_map_is_zero():
    value = torch.ones(1, 4, 3, 1, 1)
    locations = torch.tensor([[-1.0, 0.5], [0.5, 2.0], [0.0, 0.5]]).view(1, 3, 1, 1, 2)
    output = deform_attention(value, locations, torch.ones(1, 3, 1, 1)).flatten()
    assert output.tolist() == pytest.approx([0.0, 0.0, 0.5])


def test_half_precision_values_are_sampled_at_float32_locations():
    # In bfloat16 0.501 is 0.5: a whole cell of a map 256 cells wide would be missed.
    value = torch.arange(256.0).view(1, 1, 256, 1, 1).bfloat16()
    locations = torch.tensor([(129 + 0.5) / 256, 0.5]).view(1, 1, 1, 1, 2)
    output = deform_attention(value, locations, torch.ones(1, 1, 1, 1))
    assert output.dtype == torch.bfloat16
    assert output.item() == 129


def test_kernels_by_name():
    assert resolve_deform_kernel("auto", "cpu") == "reference"
    with pytest.raises(KernelError, match="one of auto, reference, triton"):
        resolve_deform_kernel("cuda", "cpu")
    with pytest.raises(KernelError, match=r"cannot run here: got 'torch.float64 on cuda'"):
        resolve_deform_kernel("triton", "cuda", torch.float64)


def test_triton_asked_for_by_name_is_never_replaced(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelError, match=r"triton (cannot run here: got 'torch.float32 on cpu'|needs the package)"):
        resolve_deform_kernel("triton", "cpu")
    monkeypatch.setattr("piip_scale.ops.fused.has_triton", lambda: False)
    with pytest.raises(KernelError, match="needs the package triton"):
        resolve_deform_kernel("triton", "cuda")
    assert resolve_deform_kernel("auto", "cuda") == "reference"
