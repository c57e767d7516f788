import pytest
import torch

from piip_scale.models.layers import DropPath, Unscaled


def applied(layer, x, residual):
    return layer(x, residual, Unscaled(), layer.draw(x))


@pytest.mark.parametrize("mode", ["zero", "skip"])
@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_the_mean_over_many_draws_is_the_plain_sum(mode, rate):
    torch.manual_seed(0)
    layer = DropPath(rate, mode).train()
    x = torch.randn(4, 3)
    mean = torch.stack([applied(layer, x, lambda part: part * 2) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, x * 3, atol=0.15, rtol=0.05)


def test_skipping_leaves_a_fixed_share_of_the_samples_out_of_the_computation():
    layer = DropPath(0.5, "skip").train()
    seen = []

    def residual(part):
        seen.append(part.shape[0])
        return torch.ones_like(part)

    x = torch.zeros(6, 2, requires_grad=True)
    output = applied(layer, x, residual)
    assert seen == [3]
    assert sorted(output[:, 0].tolist()) == [0, 0, 0, 2, 2, 2]
    output.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_skipping_keeps_at_least_one_sample():
    layer = DropPath(0.9, "skip").train()
    assert torch.equal(applied(layer, torch.zeros(1, 2), lambda x: x + 1), torch.ones(1, 2))


@pytest.mark.parametrize("mode", ["zero", "skip"])
def test_dropped_samples_are_the_input_itself_and_evaluation_drops_nothing(mode):
    torch.manual_seed(1)
    layer = DropPath(0.5, mode).train()
    x = torch.randn(8, 5)
    output = applied(layer, x, lambda part: part)
    factors = (output / x).mean(1).round(decimals=4).tolist()
    assert set(factors) == {1.0, 3.0}
    assert torch.equal(applied(layer.eval(), x, lambda part: part), 2 * x)
