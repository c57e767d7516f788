import pytest
import torch
from torch import nn

from piip_scale.config.run import OptimizerConfig
from piip_scale.engine.optim import build_optimizer, build_param_groups, set_learning_rate
from piip_scale.errors import ModelError
from piip_scale.tasks.base import ParameterRule


def rules_of(model: nn.Module) -> dict[str, ParameterRule]:
    return {
        name: ParameterRule(layer_id=float(name.split(".")[0]), decays=p.ndim > 1, fresh=False)
        for name, p in model.named_parameters()
    }


def test_without_layer_decay_two_groups_hold_every_parameter_once():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    groups = build_param_groups(model, rules_of(model), 2, OptimizerConfig(weight_decay=0.1))
    assert sorted((len(g["params"]), g["weight_decay"], g["lr_scale"]) for g in groups) == [
        (4, 0.0, 1.0),
        (4, 0.1, 1.0),
    ]
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_weight_decay_on_everything_leaves_one_group():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    (group,) = build_param_groups(model, rules_of(model), 2, OptimizerConfig(weight_decay=0.1, decay_all=True))
    assert (len(group["params"]), group["weight_decay"]) == (8, 0.1)


def test_layer_decay_follows_the_formula_and_fractions_that_coincide_share_a_group():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4)))
    ids = {"0.weight": 0.0, "1.weight": 1.5, "2.weight": 1.5, "3.weight": 4.0}
    rules = {name: ParameterRule(layer_id, True, False) for name, layer_id in ids.items()}
    groups = build_param_groups(model, rules, 3, OptimizerConfig(lr=0.5, layer_decay=0.9))
    assert [g["lr_scale"] for g in groups] == pytest.approx([0.9**4, 0.9**2.5, 1.0])
    assert [len(g["params"]) for g in groups] == [1, 2, 1]
    set_learning_rate(groups, 0.1)
    assert groups[0]["lr"] == pytest.approx(0.1 * 0.9**4)


def test_what_is_fresh_learns_at_a_rate_of_its_own_on_top_of_layer_decay():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    rules = {f"{i}.weight": ParameterRule(float(i), True, fresh=i == 2) for i in range(3)}
    groups = build_param_groups(model, rules, 1, OptimizerConfig(layer_decay=0.5, fresh_lr_ratio=10.0))
    assert [(g["parameter_names"], g["lr_scale"]) for g in groups] == [
        (["0.weight"], 0.25),
        (["1.weight"], 0.5),
        (["2.weight"], 10.0),
    ]


def test_frozen_parameters_are_in_no_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    groups = build_param_groups(model, rules_of(model), 1, OptimizerConfig())
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model[1].parameters()}


def test_a_parameter_without_a_rule_is_named():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"1 parameters without a rule \(0.bias\)"):
        build_param_groups(model, {"0.weight": ParameterRule(0, True, False)}, 1, OptimizerConfig())


def test_fused_adamw_steps_like_the_plain_one():
    torch.manual_seed(0)
    start, grads = torch.randn(7), [torch.randn(7) for _ in range(3)]
    ours, plain = (nn.Parameter(start.clone()) for _ in range(2))
    config = OptimizerConfig(lr=0.1)
    groups = [{"params": [ours], "lr": 0.1, "lr_scale": 1.0, "weight_decay": 0.05, "name": ""}]
    optimizers = [build_optimizer(groups, config), torch.optim.AdamW([plain], lr=0.1, weight_decay=0.05, fused=False)]
    for grad in grads:
        for parameter, optimizer in zip((ours, plain), optimizers, strict=True):
            parameter.grad = grad.clone()
            optimizer.step()
    assert torch.allclose(ours, plain, rtol=1e-6, atol=1e-7)
