"""Multiply-accumulates of calling a module, by the shapes its layers meet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from piip_scale.errors import ConfigError

_COUNTED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def layer_macs(module: nn.Module, *inputs: Any) -> tuple[Any, int]:
    """Calls a module and counts its linear layers and convolutions.

    Args:
        module: On the meta device, in eval mode: only shapes are computed.
        inputs: What to call it with, on the meta device likewise.

    Returns:
        What the module returned, and the multiply-accumulates of the call.

    Raises:
        ConfigError: The module holds a layer with weights that no rule here counts.
    """
    _check_layers(module)
    counts: list[int] = []

    def add(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        # Each output is a product of as many terms as one output channel has weights; of a transposed convolution
        # each input is spread over as many outputs.
        cells = given[0] if isinstance(layer, nn.ConvTranspose2d) else output
        counts.append(cells.numel() * layer.weight[0].numel())

    hooks = [layer.register_forward_hook(add) for layer in module.modules() if isinstance(layer, _COUNTED)]
    try:
        returned = module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return returned, sum(counts)


def linear_macs(module: nn.Module, rows: int) -> int:
    """Multiply-accumulates of a module's linear layers, where each sees ``rows`` vectors."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return rows * sum(layer.weight.numel() for layer in layers)


def _check_layers(module: nn.Module) -> None:
    for layer in module.modules():
        matrices = [parameter for parameter in layer.parameters(recurse=False) if parameter.ndim > 1]
        if matrices and not isinstance(layer, _COUNTED):
            raise ConfigError(
                "a layer cannot be counted",
                value=type(layer).__name__,
                rule=f"there are rules for {', '.join(kind.__name__ for kind in _COUNTED)}",
            )
