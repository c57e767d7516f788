"""AdamW with layer-wise rates: a few parameter groups, from the rules the model declares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from piip_scale.config.run import OptimizerConfig
from piip_scale.engine.zero.deepspeed_api import real_shape
from piip_scale.errors import ModelError
from piip_scale.tasks.base import ParameterRule

_SCALE_DIGITS = 12


def build_param_groups(
    model: nn.Module, rules: Mapping[str, ParameterRule], num_layers: int, config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Trainable parameters by (rate, weight decay), parameters of equal treatment together.

    Every group costs ZeRO-3 an optimiser step of its own (some 1.5 ms), so without layer decay there are two.
    Each group carries ``lr_scale``, its share of the base rate, its ``name`` and its ``parameter_names``.

    Args:
        model: The model.
        rules: The rule of every parameter by name.
        num_layers: The scale of ``layer_id``.
        config: Rates and weight decay.

    Raises:
        ModelError: A trainable parameter has no rule, or a rule has no parameter.
    """
    names = dict(model.named_parameters())
    _check_rules(names.keys() - rules.keys(), rules.keys() - names.keys())
    groups: dict[tuple[float, float], list[str]] = defaultdict(list)
    for name, parameter in names.items():
        if parameter.requires_grad:
            rule = rules[name]
            depth_scale = config.layer_decay ** (num_layers + 1 - rule.layer_id)
            scale = round(depth_scale * (config.fresh_lr_ratio if rule.fresh else 1.0), _SCALE_DIGITS)
            decays = rule.decays or config.decay_all
            groups[scale, config.weight_decay if decays else 0.0].append(name)
    return [
        {
            "params": [names[name] for name in members],
            "parameter_names": members,
            "lr": config.lr * scale,
            "lr_scale": scale,
            "weight_decay": decay,
            "name": f"scale {scale:.4g}, decay {decay:.4g}",
        }
        for (scale, decay), members in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> AdamW:
    """Torch's AdamW over the groups, fused: one kernel a group on CUDA and on CPUs alike.

    DeepSpeed's own Adams compile an extension at first use and would need a compiler on the machine; its Adam for
    offloaded state is no faster than this one on host tensors (``benchmarks/engine.md``).
    """
    return AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def set_learning_rate(param_groups: list[dict[str, Any]], lr: float) -> None:
    """Gives every group its share of the base rate ``lr``."""
    for group in param_groups:
        group["lr"] = lr * group["lr_scale"]


def group_lines(groups: list[dict[str, Any]]) -> list[str]:
    """One line of text for each group, for the start report."""
    return [
        f"  {group['name']}: {len(group['params'])} tensors, {sum(_numel(p) for p in group['params']) / 1e6:.2f} M"
        for group in groups
    ]


def _numel(parameter: torch.Tensor) -> int:
    return real_shape(parameter).numel()


def _check_rules(without_rule: set[str], without_parameter: set[str]) -> None:
    for names, what in ((without_rule, "parameters without a rule"), (without_parameter, "rules without a parameter")):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise ModelError(
                f"parameter_rules() and named_parameters() differ: {len(names)} {what} ({shown})",
                rule="each parameter has exactly one rule",
            )
