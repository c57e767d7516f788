"""A model on several devices of one node: its parts in the order of calls, each on one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from piip_scale.errors import WorldError
from piip_scale.files import available_memory_bytes
from piip_scale.models.placement import place

ALL = "all"
"""The name of all GPUs of this process."""
FILLED = 0.9
"""Share of a device's free memory that weights may take; the rest is for what is computed."""
_CPU = "cpu"


def named_devices(names: str | Sequence[str]) -> tuple[torch.device, ...]:
    """The devices of names: ``cuda:0,cuda:1`` or a sequence of such, ``cpu`` among them, or ``all`` GPUs.

    Raises:
        WorldError: This process has no such device, or one is named twice.
    """
    asked = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if asked == [ALL]:
        if not gpus:
            raise WorldError(
                "no GPU to spread over", rule="this process sees none", fix="name devices, as in --devices cpu"
            )
        asked = gpus
    for number, name in enumerate(asked):
        if name not in (*gpus, _CPU):
            raise WorldError("unknown device", value=name, rule=f"this process has {', '.join([*gpus, _CPU])}")
        if name in asked[:number]:
            raise WorldError("device named twice", value=name, rule="each gets parts once", fix="name it once")
    return tuple(torch.device(name) for name in asked)


def room_bytes(device: torch.device) -> int:
    """How many bytes of weights a device takes, now."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory_bytes()
    return int(free * FILLED)


class Spread:
    """A model's parts on devices, by their bytes and the devices' free memory.

    Args:
        model: A ``TrainableModel`` in the precision it is used in; its network may be on the meta device.
        devices: In the order in which parts follow.

    Attributes:
        by_name: Where each tensor of the state dict belongs.

    Raises:
        ModelError: The weights do not fit.
    """

    def __init__(self, model: nn.Module, devices: Sequence[torch.device]) -> None:
        parts: list[list[nn.Module]] = model.call_order()  # type: ignore[operator]  # a TrainableModel
        places = place([_bytes(part) for part in parts], {str(device): room_bytes(device) for device in devices})
        placed = zip(parts, map(torch.device, places), strict=True)
        self._modules = [(module, device) for part, device in placed for module in part]
        names = {module: name for name, module in model.named_modules()}
        self.by_name = {
            f"{names[module]}.{name}": device for module, device in self._modules for name in module.state_dict()
        }

    def settle(self) -> None:
        """Has each part compute on its device, on what is brought there; once weights are loaded."""
        for module, device in self._modules:
            # What was read is there.
            if any(tensor.device != device for tensor in _tensors([module])):
                module.to(device)
            module.forward = _computed_on(device, module.forward)


def _bytes(modules: Sequence[nn.Module]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(modules))


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Parameters and buffers, each once."""
    found = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return list({id(tensor): tensor for tensor in found}.values())


def _computed_on(device: torch.device, forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def moved(*arguments: Any, **options: Any) -> Any:
        here = [argument.to(device) if isinstance(argument, Tensor) else argument for argument in arguments]
        # Triton starts kernels on the current device, wherever their tensors are.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return forward(*here, **options)

    return moved
