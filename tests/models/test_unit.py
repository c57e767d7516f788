"""A checkpointed unit computes what torch's own checkpointing does, keeps no more, and shows every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from piip_scale.config.branches import VitBranchConfig
from piip_scale.config.interaction import InteractionConfig
from piip_scale.config.model import Kernels
from piip_scale.models.interaction import InteractionUnit
from piip_scale.models.unit import Unit
from piip_scale.models.vit import Block

NUMBERS = {"resolution_px": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path_rate": 0.5, "qk_norm": True}


def block() -> tuple[Unit, tuple]:
    config = VitBranchConfig(**NUMBERS, layer_scale_init=0.5, norm="rmsnorm", drop_path_schedule="constant")
    return Block(config, 1, Kernels()), (torch.randn(3, 6, 32), 2, 3)


def interaction() -> tuple[Unit, tuple]:
    unit = InteractionUnit(InteractionConfig(num_stages=1, num_heads=2, gamma_init=0.1), 32, 16, Kernels())
    return unit, (torch.randn(2, 3, 3, 32), torch.randn(2, 5, 5, 16))


def torchs(unit: Unit, arguments: tuple):
    drawn = unit.draw(*arguments)
    return checkpoint(unit.compute, drawn, *arguments, use_reentrant=False, preserve_rng_state=False)


def ours(unit: Unit, arguments: tuple):
    unit.checkpointed = True
    return unit(*arguments)


def plain(unit: Unit, arguments: tuple):
    unit.checkpointed = False
    return unit(*arguments)


def results(run, unit: Unit, arguments: tuple, trained: bool, dtype: torch.dtype) -> list:
    """Outputs, gradients of the inputs and the parameters; how many tensors were kept, and gradients hooked."""
    unit = copy.deepcopy(unit).to(dtype).train()
    arguments = tuple(a.to(dtype).requires_grad_(trained) if isinstance(a, torch.Tensor) else a for a in arguments)
    kept, seen = [], []
    for parameter in unit.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.shape))
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(1) or tensor, lambda tensor: tensor):
        output = run(unit, arguments)
    outputs = output if isinstance(output, tuple) else (output,)
    (outputs[0].float().square().sum() if len(outputs) == 1 else outputs[0].float().sum()).backward()
    sources = [a for a in arguments if isinstance(a, torch.Tensor)] if trained else []
    gradients = [torch.zeros_like(s) if s.grad is None else s.grad for s in (*sources, *unit.parameters())]
    return [[o.detach() for o in outputs], gradients, len(kept), len(seen)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained_below", [True, False])
@pytest.mark.parametrize("build", [block, interaction])
def test_it_is_torchs_checkpointing_bit_for_bit_and_keeps_its_arguments_only(build, trained_below, dtype):
    torch.manual_seed(0)
    unit, arguments = build()
    one, other, uncheckpointed = (results(run, unit, arguments, trained_below, dtype) for run in (ours, torchs, plain))
    # Of the two outputs of an interaction only one reaches the loss: what lies on the other's way has zeros.
    torch.testing.assert_close(one[:2], other[:2], rtol=0, atol=0)
    torch.testing.assert_close(one[:2], uncheckpointed[:2], rtol=0, atol=0)
    assert one[2] == sum(isinstance(argument, torch.Tensor) for argument in arguments) < uncheckpointed[2]
    assert one[3] == len(list(unit.parameters()))


def test_a_parameter_that_two_modules_share_has_its_gradient_once():
    class Tied(Unit):
        def __init__(self) -> None:
            super().__init__(checkpointed=True)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def draw(self, x):
            return ()

        def compute(self, drawn, x):
            return self.second(self.first(x))

    torch.manual_seed(0)
    unit, x = Tied().train(), torch.randn(2, 4)
    unit(x).sum().backward()
    found = unit.first.weight.grad
    unit.zero_grad()
    plain(unit, (x,)).sum().backward()
    torch.testing.assert_close(found, unit.first.weight.grad)
