"""Weights in 8 bits: how far they are from what they stand for, and products that are those of what they stand for."""

import pytest
import torch
from torch.nn import functional

from piip_scale.models.layers import Linear
from piip_scale.ops.stored_linear import require_stored, store, stored_linear

STEPS = {"int8": 0.5 / 127, "fp8": 2.0**-4}
"""Half a step of int8 over a channel's largest weight; half a unit of e4m3's three bits of mantissa, of each weight."""


def widened(weight, scale, kind):
    numbers = weight if kind == "int8" else weight.view(torch.float8_e4m3fn)
    return numbers.float() * scale[:, None]


def some(rows=48, columns=64):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    return weight * torch.logspace(-6, 3, rows)[:, None]


@pytest.mark.parametrize("kind", STEPS)
def test_a_stored_weight_is_as_near_as_its_kind_can_be(kind):
    weight = some()
    numbers, scale = store(weight, kind)
    assert numbers.element_size() == 1
    assert torch.equal(scale, scale.bfloat16().float())
    error = (widened(numbers, scale, kind) - weight).abs()
    per_channel = weight.abs().amax(1, keepdim=True)
    # The scale's own rounding moves a step by 2^-9, and clips what is largest by as much.
    if kind == "int8":
        assert (error <= per_channel * (STEPS[kind] + 2.0**-8)).all()
    else:
        # Below e4m3's normal numbers the step is that of the smallest one.
        assert (error <= weight.abs() * (STEPS[kind] + 2.0**-8) + per_channel * 2.0**-9 / 448).all()


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_widened_weight(kind, dtype):
    numbers, scale = store(some() / 100, kind)
    bias = torch.randn(48).to(dtype)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    found, wanted = (
        stored_linear(x, numbers, scale, bias),
        functional.linear(wide, widened(numbers, scale, kind), bias.float()),
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.5}
    torch.testing.assert_close(found.float(), wanted, **tolerance)
    found.float().sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(x.grad.float(), wide.grad, **tolerance)


@pytest.mark.parametrize("kind", STEPS)
def test_what_is_kept_for_the_backward_pass_has_8_bits(kind):
    layer, saved = Linear(64, 48), []
    layer.store_weight(kind)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert sorted(t.numel() * t.element_size() for t in saved) == [48 * 4, 48 * 64]
    assert not any(parameter.requires_grad for name, parameter in layer.named_parameters() if "weight" in name)


def test_every_device_here_can():
    for kind in STEPS:
        require_stored(kind, torch.device("cpu"))
