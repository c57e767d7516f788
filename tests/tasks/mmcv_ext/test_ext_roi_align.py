"""RoIAlign against bilinear sampling spelled out bin by bin."""

import math

import pytest
import torch

from piip_scale.errors import KernelError
from piip_scale.tasks import mmcv_ext

mmcv_ext.install()
from mmcv.ops import roi_align  # noqa: E402


def _bilinear(plane_CHW, y, x):
    height, width = plane_CHW.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return plane_CHW.new_zeros(plane_CHW.shape[0])
    y, x = max(y, 0.0), max(x, 0.0)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = (0.0 if top == height - 1 else y - top), (0.0 if left == width - 1 else x - left)
    upper = plane_CHW[:, top, left] * (1 - dx) + plane_CHW[:, top, right] * dx
    lower = plane_CHW[:, bottom, left] * (1 - dx) + plane_CHW[:, bottom, right] * dx
    return upper * (1 - dy) + lower * dy


def _slow_roi_align(features, rois, size, scale, ratio, aligned):
    shift = 0.5 if aligned else 0.0
    rows = []
    for roi in rois.tolist():
        x1, y1, x2, y2 = (value * scale - shift for value in roi[1:])
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        bin_h, bin_w = height / size, width / size
        per_y = ratio or math.ceil(height / size)
        per_x = ratio or math.ceil(width / size)
        bins = [
            sum(
                _bilinear(
                    features[int(roi[0])],
                    y1 + (row + (i + 0.5) / per_y) * bin_h,
                    x1 + (col + (j + 0.5) / per_x) * bin_w,
                )
                for i in range(per_y)
                for j in range(per_x)
            )
            / (per_y * per_x)
            for row in range(size)
            for col in range(size)
        ]
        rows.append(torch.stack(bins, 1).view(-1, size, size))
    return torch.stack(rows)


ROIS = torch.tensor(
    [
        [0, 3.2, 5.1, 30.7, 22.9],
        [1, -6.0, -3.0, 12.0, 9.0],  # leaves the image at the top left
        [1, 20.0, 25.0, 45.0, 50.0],  # and at the bottom right
        [0, 10.0, 10.0, 11.0, 11.5],  # smaller than a cell
    ]
)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_forward_and_gradient_are_the_loop(aligned, ratio):
    torch.manual_seed(0)
    features = torch.randn(2, 3, 9, 10, requires_grad=True)
    slow_features = features.detach().clone().requires_grad_()
    output = roi_align(features, ROIS, 3, 0.25, ratio, "avg", aligned)
    expected = _slow_roi_align(slow_features, ROIS, 3, 0.25, ratio, aligned)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(output)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(features.grad, slow_features.grad, atol=1e-5, rtol=1e-5)


def test_bf16_features_are_sampled_in_fp32():
    torch.manual_seed(1)
    features = torch.randn(2, 3, 9, 10).bfloat16().requires_grad_()
    output = roi_align(features, ROIS, 3, 0.25, 2, "avg", True)
    expected = roi_align(features.detach().float(), ROIS, 3, 0.25, 2, "avg", True)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected.bfloat16())
    output.sum().backward()
    assert features.grad is not None
    assert features.grad.dtype == torch.bfloat16


def test_no_boxes():
    features = torch.randn(1, 3, 4, 4, requires_grad=True)
    output = roi_align(features, torch.zeros(0, 5), 7)
    output.sum().backward()
    assert output.shape == (0, 3, 7, 7)
    assert features.grad is not None
    assert not features.grad.any()


def test_max_pooling_is_refused():
    with pytest.raises(KernelError, match="max pooling"):
        roi_align(torch.randn(1, 3, 4, 4), ROIS[:1], 7, 1.0, 2, "max")


def test_deterministic_mode_gives_the_same_from_the_host(monkeypatch):
    torch.manual_seed(0)
    features = torch.randn(2, 3, 12, 16, requires_grad=True)
    plain = roi_align(features, ROIS, 3, 0.5, 0)
    (expected,) = torch.autograd.grad(plain.square().sum(), features)
    # Where torchvision's own function would leave its kernel; on a CPU nothing else differs.
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    again = roi_align(features, ROIS, 3, 0.5, 0)
    (found,) = torch.autograd.grad(again.square().sum(), features)
    assert torch.equal(again, plain)
    assert torch.equal(found, expected)
