"""Bytes that calls keep for their way back, and hold on it, against sums by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from piip_scale.models.saved_activations import HeadBytes, bytes_both_ways, bytes_in_turn

ROWS, WIDTH = 10, 8
MAP = ROWS * WIDTH * 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_chain_keeps_its_maps_and_has_two_gradients_on_the_way_back(device):
    chain = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid(), nn.Linear(WIDTH, WIDTH), nn.Sigmoid()).to(device)
    given = torch.empty(ROWS, WIDTH, device=device, requires_grad=True)
    found = bytes_both_ways(chain, given)
    # Both sigmoids keep what they return; linear layers their weights, and the second one what the first sigmoid keeps.
    assert found.kept == 2 * MAP + 2 * WIDTH * WIDTH * 4
    # The gradient that comes, and the one that is made of it.
    assert found.most == found.kept + 2 * MAP
    assert given.grad is None
    assert all(parameter.grad is None for parameter in chain.parameters())


def test_the_way_back_begins_with_the_last_call():
    large, small = HeadBytes(100, 150), HeadBytes(10, 12)
    assert bytes_in_turn([large, small]) == HeadBytes(110, 150)
    assert bytes_in_turn([small, large]) == HeadBytes(110, 160)
    assert bytes_in_turn([]) == HeadBytes(0, 0)
