"""Focal losses against the paper's formula, differentiated by autograd in double precision."""

import pytest
import torch

from piip_scale.tasks import mmcv_ext

mmcv_ext.install()
from mmcv.ops import sigmoid_focal_loss, softmax_focal_loss  # noqa: E402


def _sigmoid_formula(logits, target, gamma, alpha, weight):
    total = logits.new_zeros(())
    for row, label in enumerate(target.tolist()):
        for column in range(logits.shape[1]):
            p = torch.sigmoid(logits[row, column])
            p_right = p if column == label else 1 - p
            factor = alpha if column == label else 1 - alpha
            scale = weight[label] if weight is not None and label < logits.shape[1] else 1.0
            total = total - scale * factor * (1 - p_right) ** gamma * p_right.log()
    return total


def _softmax_formula(logits, target, gamma, alpha, weight):
    total = logits.new_zeros(())
    for row, label in enumerate(target.tolist()):
        p = torch.softmax(logits[row], 0)[label]
        scale = 1.0 if weight is None else weight[label]
        total = total - scale * alpha * (1 - p) ** gamma * p.log()
    return total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("fast", "formula", "num_labels"),
    [(sigmoid_focal_loss, _sigmoid_formula, 5), (softmax_focal_loss, _softmax_formula, 4)],
)
def test_loss_and_gradient_are_the_formula(fast, formula, num_labels, gamma, weighted):
    torch.manual_seed(0)
    target = torch.arange(12) % num_labels
    weight = torch.rand(4) + 0.5 if weighted else None
    logits = (3 * torch.randn(12, 4)).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    loss = fast(logits, target, gamma, 0.25, weight, "sum")
    expected = formula(exact, target, gamma, 0.25, None if weight is None else weight.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fast", [sigmoid_focal_loss, softmax_focal_loss])
def test_mean_divides_by_the_rows(fast):
    logits, target = torch.randn(6, 4), torch.arange(6) % 4
    torch.testing.assert_close(
        fast(logits, target, 2.0, 0.25, None, "mean") * 6, fast(logits, target, 2.0, 0.25, None, "sum")
    )


@pytest.mark.parametrize("fast", [sigmoid_focal_loss, softmax_focal_loss])
def test_certain_logits_stay_finite(fast):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    loss = fast(logits, torch.tensor([0, 0]), 0.5, 0.25, None, "sum")
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
