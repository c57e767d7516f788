"""Cases of test_deform_attention_triton, run in a process of their own."""

import pytest
import torch
from torch import Tensor

from piip_scale.ops.deform_attention import deform_attention, deform_attention_reference, grid_deform_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(dtype: torch.dtype, heads: int = 2, channels: int = 3, queries: int = 5, points: int = 4) -> list[Tensor]:
    """Values on a 4 x 3 grid; locations leave the map on every side."""
    generator = torch.Generator().manual_seed(channels)
    value = torch.randn(2, 4, 3, heads, channels, generator=generator).to(dtype)
    locations = torch.rand(2, queries, heads, points, 2, generator=generator) * 1.6 - 0.3
    weights = torch.randn(2, queries, heads, points, generator=generator).softmax(-1)
    return [tensor.to(DEVICE).requires_grad_() for tensor in (value, locations, weights)]


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 8, 1, 1), (3, 40, 9, 2), (1, 100, 37, 4)])
def test_forward_and_backward_follow_the_reference(shape):
    tensors = inputs(torch.float32, *shape)
    expected = deform_attention_reference(*tensors)
    output = deform_attention(*tensors, kernel="triton")
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    cotangent = torch.randn_like(expected)
    ours = torch.autograd.grad(output, tensors, cotangent)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, tensors, cotangent), atol=1e-4, rtol=1e-4)


def test_half_precision_values_are_accumulated_in_float32():
    tensors = inputs(torch.bfloat16, channels=16)
    expected = deform_attention_reference(*tensors)
    output = deform_attention(*tensors, kernel="triton")
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, atol=1e-2, rtol=1e-2)
    cotangent = torch.randn_like(expected)
    ours = torch.autograd.grad(output, tensors, cotangent)
    assert [grad.dtype for grad in ours] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, tensors, cotangent), atol=3e-2, rtol=3e-2)


def test_many_queries_at_one_cell_add_up_exactly():
    # 1,000 gradients of 1 at one cell: adding them one by one in bfloat16 would stop at 256.
    value = torch.zeros(1, 1, 1, 1, 1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    locations = torch.full((1, 1000, 1, 1, 2), 0.5, device=DEVICE)
    output = deform_attention(value, locations, torch.ones(1, 1000, 1, 1, device=DEVICE), kernel="triton")
    output.sum().backward()
    assert value.grad.item() == 1000


def test_locations_far_outside_give_zero():
    value = torch.ones(1, 4, 3, 1, 1, device=DEVICE)
    locations = torch.tensor([1e30, -1e30], device=DEVICE).view(1, 1, 1, 1, 2)
    assert deform_attention(value, locations, torch.ones(1, 1, 1, 1, device=DEVICE), kernel="triton").item() == 0


@pytest.mark.parametrize(
    ("shape", "grid", "dtype"),
    [
        ((2, 3, 4), (5, 3), torch.float32),
        # Points that are no power of two, and heads whose queries take several programs.
        ((1, 100, 3), (2, 9), torch.float32),
        ((2, 40, 4), (3, 2), torch.bfloat16),
        ((2, 24, 1), (1, 1), torch.bfloat16),
    ],
)
def test_queries_on_a_grid_follow_the_reference(shape, grid, dtype):
    heads, channels, points = shape
    generator = torch.Generator().manual_seed(channels)

    def drawn(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(2, *sizes, generator=generator)).to(DEVICE, dtype).requires_grad_()

    # Offsets leave the map on every side.
    offsets = drawn(*grid, heads, points, 2, scale=3)
    tensors = [drawn(4, 3, heads, channels), offsets, drawn(*grid, heads, points)]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output, expected = (grid_deform_attention(*tensors, kernel="triton"), grid_deform_attention(*wide))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
    assert output.dtype == dtype
    cotangent = torch.randn_like(output)
    ours = torch.autograd.grad(output, tensors, cotangent)
    assert [grad.dtype for grad in ours] == [dtype] * 3
    for found, truth in zip(ours, torch.autograd.grad(expected, wide, cotangent.double()), strict=True):
        torch.testing.assert_close(found.double(), truth, atol=tolerance * (1 + truth.abs().max().item()), rtol=0)


def test_scores_far_apart_make_no_infinities():
    scores = torch.tensor([0.0, 1e4, -1e4], device=DEVICE).view(1, 1, 1, 1, 3).requires_grad_()
    value, offsets = torch.ones(1, 1, 1, 1, 1, device=DEVICE), torch.zeros(1, 1, 1, 1, 3, 2, device=DEVICE)
    output = grid_deform_attention(value, offsets, scores, "triton")
    output.sum().backward()
    assert output.item() == 1
    assert torch.equal(scores.grad, torch.zeros_like(scores))
