"""Losses tied to features, against the sum of every map times zero."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from piip_scale.tasks.heads import Anchor

SHAPES = [(2, 3, 8, 8), (2, 3, 4, 4)]


class Sizes(TorchDispatchMode):
    """Notes how large the tensors are that operators make anew."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.made.append(result.numel())
        return result


def by_sums(losses, features):
    anchor = sum(feature.sum() for feature in features) * 0
    return [loss + anchor for loss in losses]


def gradients(num_read, factor, tied):
    """Of sources of two features, of which the losses read so many, and of a weight that they read anyway."""
    torch.manual_seed(0)
    weight = torch.ones((), requires_grad=True)
    sources = [torch.randn(shape, requires_grad=True) for shape in SHAPES]
    features = [source * 2 for source in sources]
    anchor = Anchor()
    taken = anchor.take(features) if tied else features
    losses = [weight * 3, *(feature.square().sum() for feature in taken[:num_read])]
    outputs = anchor.tie(losses, taken) if tied else by_sums(losses, features)
    assert [output.item() for output in outputs] == [loss.item() for loss in losses]
    (sum(outputs) * factor).backward()
    return [weight.grad, *(source.grad for source in sources)]


@pytest.mark.parametrize("num_read", [0, 1, 2])
@pytest.mark.parametrize("factor", [1.0, math.nan], ids=["finite", "not finite"])
def test_gradients_are_those_of_the_sums(num_read, factor):
    found, expected = (gradients(num_read, factor, tied) for tied in (True, False))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_no_map_is_read_or_made():
    features = [torch.randn(shape, requires_grad=True) for shape in SHAPES]
    anchor = Anchor()
    with Sizes() as sizes:
        taken = anchor.take(features)
        (loss,) = anchor.tie([taken[0][0, 0, 0, 0]], taken)
    assert max(sizes.made, default=0) <= 1
    assert loss.requires_grad
    with Sizes() as sizes:
        torch.autograd.grad(anchor.tie([torch.ones((), requires_grad=True)], taken), taken, allow_unused=True)
    assert max(sizes.made) <= 1


def test_features_of_a_frozen_network_ask_for_nothing():
    anchor = Anchor()
    taken = anchor.take([torch.randn(shape) for shape in SHAPES])
    weight = torch.ones((), requires_grad=True)
    (loss,) = anchor.tie([weight * 2], taken)
    loss.backward()
    assert weight.grad == 2
    assert not any(feature.requires_grad for feature in taken)
