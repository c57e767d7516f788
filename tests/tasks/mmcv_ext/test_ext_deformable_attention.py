"""Multi-scale deformable attention against explicit loops over cells."""

import math

import torch

from piip_scale.tasks import mmcv_ext

mmcv_ext.install()
from mmcv.ops.multi_scale_deform_attn import (  # noqa: E402
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)

SHAPES = torch.tensor([[5, 4], [3, 2]])
STARTS = torch.tensor([0, 20])


def _inputs(dtype=torch.float32):
    torch.manual_seed(0)
    value = torch.randn(2, 26, 3, 4, dtype=dtype)
    locations = torch.rand(2, 6, 3, 2, 2, 2, dtype=dtype) * 1.4 - 0.2  # some lie outside
    weights = torch.rand(2, 6, 3, 2, 2, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (value, locations, weights)]


def _cell(value, batch, start, size, head, row, column):
    height, width = size
    if not (0 <= row < height and 0 <= column < width):
        return value.new_zeros(value.shape[-1])
    return value[batch, start + row * width + column, head]


def _sample(value, batch, start, size, head, location):
    x, y = location[0] * size[1] - 0.5, location[1] * size[0] - 0.5
    left, top = math.floor(x.item()), math.floor(y.item())
    result = value.new_zeros(value.shape[-1])
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        share = (1 - (x - column).abs()) * (1 - (y - row).abs())
        result = result + share * _cell(value, batch, start, size, head, row, column)
    return result


def _loops(value, locations, weights):
    batches, queries, heads, levels, points = weights.shape
    rows = [
        sum(
            weights[b, q, m, level, p]
            * _sample(value, b, int(STARTS[level]), SHAPES[level].tolist(), m, locations[b, q, m, level, p])
            for level in range(levels)
            for p in range(points)
        )
        for b in range(batches)
        for q in range(queries)
        for m in range(heads)
    ]
    return torch.stack(rows).view(batches, queries, -1)


def test_forward_and_gradients_are_the_loops():
    fast, slow = _inputs(), _inputs()
    output = MultiScaleDeformableAttnFunction.apply(fast[0], SHAPES, STARTS, fast[1], fast[2], 64)
    expected = _loops(*slow)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(output)
    output.backward(grad)
    expected.backward(grad)
    for mine, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_equals_mmcvs_own_cpu_path():
    inputs = _inputs()
    output = MultiScaleDeformableAttnFunction.apply(inputs[0], SHAPES, STARTS, inputs[1], inputs[2], 64)
    torch.testing.assert_close(output, multi_scale_deformable_attn_pytorch(inputs[0], SHAPES, inputs[1], inputs[2]))


def test_bf16_is_computed_in_fp32():
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in _inputs()]
    singles = [tensor.detach().float().requires_grad_() for tensor in halves]
    output = MultiScaleDeformableAttnFunction.apply(halves[0], SHAPES, STARTS, halves[1], halves[2], 64)
    expected = _loops(*singles)
    torch.testing.assert_close(output.float(), expected, atol=1e-2, rtol=1e-2)
    output.sum().backward()
    expected.sum().backward()
    # Rounded locations may lie exactly between cells, where the gradient towards them has a jump.
    for mine, theirs in ((halves[0], singles[0]), (halves[2], singles[2])):
        torch.testing.assert_close(mine.grad.float(), theirs.grad, atol=2e-2, rtol=2e-2)
