"""Deformable convolution against a sum over kernel taps sampled by ``grid_sample``."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from piip_scale.tasks import mmcv_ext

mmcv_ext.install()
from mmcv.ops import deform_conv2d, modulated_deform_conv2d  # noqa: E402

STRIDE, PADDING, DILATION, DEFORM_GROUPS = 2, 1, 1, 2


def _sampled(features, offset_y, offset_x, tap_y, tap_x):
    rows, columns = offset_y.shape[1:]
    y = torch.arange(rows)[:, None] * STRIDE - PADDING + tap_y * DILATION + offset_y
    x = torch.arange(columns)[None] * STRIDE - PADDING + tap_x * DILATION + offset_x
    height, width = features.shape[2:]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return F.grid_sample(features, grid, align_corners=False)


def _by_taps(features, offset, mask, weight, bias):
    taps = [(i, j) for i in range(3) for j in range(3)]
    offset = offset.unflatten(1, (DEFORM_GROUPS, 9, 2))
    mask = mask.unflatten(1, (DEFORM_GROUPS, 9))
    output = bias[None, :, None, None]
    for tap, (i, j) in enumerate(taps):
        groups = [
            _sampled(part, offset[:, g, tap, 0], offset[:, g, tap, 1], i, j) * mask[:, g, tap, None]
            for g, part in enumerate(features.chunk(DEFORM_GROUPS, 1))
        ]
        output = output + torch.einsum("bchw,oc->bohw", torch.cat(groups, 1), weight[:, :, i, j])
    return output


def _inputs():
    torch.manual_seed(0)
    shapes = [(2, 4, 7, 8), (2, DEFORM_GROUPS * 18, 4, 4), (2, DEFORM_GROUPS * 9, 4, 4), (5, 4, 3, 3), (5,)]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def _check(output, expected, mine, theirs):
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(output)
    output.backward(grad)
    expected.backward(grad)
    for fast, slow in zip(mine, theirs, strict=True):
        torch.testing.assert_close(fast.grad, slow.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_bias", [True, False])
def test_modulated_convolution_and_its_gradients(with_bias):
    mine, theirs = _inputs(), _inputs()
    features, offset, mask, weight, bias = mine
    geometry = (STRIDE, PADDING, DILATION, 1, DEFORM_GROUPS)
    output = modulated_deform_conv2d(features, offset, mask, weight, bias if with_bias else None, *geometry)
    expected = _by_taps(*theirs[:4], theirs[4] if with_bias else torch.zeros(5))
    _check(output, expected, mine[: 4 + with_bias], theirs[: 4 + with_bias])


def test_plain_convolution_and_its_gradients():
    mine, theirs = _inputs(), _inputs()
    output = deform_conv2d(mine[0], mine[1], mine[3], STRIDE, PADDING, DILATION, 1, DEFORM_GROUPS)
    expected = _by_taps(theirs[0], theirs[1], torch.ones(theirs[2].shape), theirs[3], torch.zeros(5))
    _check(output, expected, [mine[0], mine[1], mine[3]], [theirs[0], theirs[1], theirs[3]])
