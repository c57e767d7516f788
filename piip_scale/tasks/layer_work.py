"""Multiply-accumulates of calling a module, by the shapes its layers meet and the gradients autograd gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from piip_scale.errors import ConfigError
from piip_scale.models.work import Work, layer, total

_COUNTED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def layer_work(module: nn.Module, *inputs: Any) -> tuple[Any, Work]:
    """Calls a module and counts its linear layers and convolutions.

    Args:
        module: On the meta device, in eval mode: only shapes are computed. Frozen weights have no gradient.
        inputs: What to call it with, on the meta device likewise; they have a gradient where training gives them one.

    Returns:
        What the module returned, and the multiply-accumulates of the call and of its backward pass.

    Raises:
        ConfigError: The module holds a layer with weights that no rule here counts.
    """
    _check_layers(module)
    works: list[Work] = []

    def add(called: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(called.weight, Tensor)
        # Each output is a product of as many terms as one output channel has weights; of a transposed convolution
        # each input is spread over as many outputs.
        cells = given[0] if isinstance(called, nn.ConvTranspose2d) else output
        macs = cells.numel() * called.weight[0].numel()
        works.append(layer(macs, trained=called.weight.requires_grad, upstream=given[0].requires_grad))

    hooks = [counted.register_forward_hook(add) for counted in module.modules() if isinstance(counted, _COUNTED)]
    try:
        with torch.enable_grad():
            returned = module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return returned, total(works)


def linear_work(module: nn.Module, rows: int) -> Work:
    """Of a module's linear layers, where each sees ``rows`` vectors that have a gradient."""
    layers = (linear for linear in module.modules() if isinstance(linear, nn.Linear))
    return total(layer(rows * linear.weight.numel(), trained=linear.weight.requires_grad) for linear in layers)


def _check_layers(module: nn.Module) -> None:
    for part in module.modules():
        matrices = [parameter for parameter in part.parameters(recurse=False) if parameter.ndim > 1]
        if matrices and not isinstance(part, _COUNTED):
            raise ConfigError(
                "a layer cannot be counted",
                value=type(part).__name__,
                rule=f"there are rules for {', '.join(kind.__name__ for kind in _COUNTED)}",
            )
