import pytest
import torch
from torch.nn import functional

from piip_scale.ops.double_map import double_map


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_is_torchs_transposed_convolution_forward_and_backward(with_bias):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 3, 4), (5, 6, 2, 2), *[(6,)] * with_bias]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    expected = functional.conv_transpose2d(*tensors, stride=2)
    output = double_map(*tensors)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    cotangent = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(output, tensors, cotangent), torch.autograd.grad(expected, tensors, cotangent)
    )


def test_channels_lie_together_and_a_wider_dtype_is_written_at_once():
    map_BCHW = torch.randn(1, 4, 2, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(4, 8, 2, 2).bfloat16(), torch.randn(8).bfloat16()
    output = double_map(map_BCHW, weight, bias, torch.float32)
    assert output.dtype == torch.float32
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(output, double_map(map_BCHW, weight, bias).float())
