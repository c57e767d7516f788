"""A model's first weights: each module's drawn by itself or read from a file, each sharded parameter cut at once.

What a task leaves on the meta device is made here. Under ZeRO-3 no rank ever holds all of a sharded branch: one module
at a time is drawn and cut, or only the rank's own elements are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piip_scale.checkpoint.slices import Slice, rank_slice
from piip_scale.engine.zero.deepspeed_api import zero_init
from piip_scale.errors import ModelError

Place = Callable[[str, Tensor, nn.Parameter], nn.Parameter]


class Cutter:
    """Makes ZeRO-3's parameters out of values, writing no more of each than this rank keeps.

    deepspeed 0.19.8 converts whole parameters only, and sends rank 0's to all ranks first; all ranks have the same
    values here. The whole one that it cuts is memory without pages on a CPU, and one parameter's on a GPU.

    Args:
        config: DeepSpeed's config dict.
        group: Process group of the ranks that share the parameters; ``None`` for all.
    """

    def __init__(self, config: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
        self._init = zero_init(config, group)

    def cut(self, value: Tensor, like: nn.Parameter) -> nn.Parameter:
        """This rank's part of a value as a parameter with the shape and dtype of another, in ZeRO-3's form."""
        whole = torch.empty(like.shape, dtype=like.dtype, device=self._init.local_device)
        for part in self._own_slices(whole.numel()):
            part.of(whole.view(-1)).copy_(part.of(value.reshape(-1)))
        parameter: Any = nn.Parameter(whole, requires_grad=like.requires_grad)
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()
        return parameter  # type: ignore[no-any-return]

    def _own_slices(self, numel: int) -> list[Slice]:
        """Of a whole parameter what this rank keeps: its share, and that of its node's second copy under hpZ."""
        zero = self._init
        aligned = -(-numel // zero.dp_world_size) * zero.dp_world_size
        shares = [(zero.rank, aligned // zero.dp_world_size)]
        if zero.zero_param_process_group is not None:
            shares.append((zero.rank_in_group, aligned // zero.num_ranks_in_param_group))
        return [rank_slice("", numel, part, rank, start=min(rank * part, numel)) for rank, part in shares]


@torch.no_grad()
def fill(model: nn.Module, weights: Mapping[str, Tensor], seed: int, place: Place) -> None:
    """Gives a model its weights: those given, and for the rest of its meta parameters drawn ones.

    A module draws from its own seed, so its values depend neither on other modules nor on the ranks. Not collective,
    but where ``place`` is.

    Args:
        model: Modules that own meta parameters redraw those, and no others, in ``reset_parameters``.
        weights: Values by the names of parameters and buffers, of any float dtype; also for those that have values
            already.
        seed: The run's seed.
        place: Makes the parameter that takes the place of one on the meta device from its name and value.

    Raises:
        ModelError: A module with meta parameters cannot draw them.
    """
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{key}" if prefix else key: key for key, _ in module.named_parameters(recurse=False)}
        before = {name: module.get_parameter(key) for name, key in own.items()}
        missing = any(parameter.is_meta and name not in weights for name, parameter in before.items())
        drawn = draw(module, _seed_of(seed, prefix)) if missing else {}
        for name, parameter in before.items():
            if parameter.is_meta:
                value = weights[name] if name in weights else drawn[own[name]]
                module.register_parameter(own[name], place(name, value, parameter))
            elif name in weights:
                parameter.copy_(weights[name])
        for key, buffer in module.named_buffers(recurse=False):
            name = f"{prefix}.{key}" if prefix else key
            if name in weights:
                buffer.copy_(weights[name])


@torch.no_grad()
def fill_blank(model: nn.Module, place: Place) -> None:
    """Gives a model's meta parameters zeros, for weights that come from a checkpoint: nothing is drawn or read.

    Args:
        model: The model.
        place: As in ``fill``.
    """
    for prefix, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                # One element seen as many: whole parameters of a sharded branch need not fit.
                zeros = torch.zeros(1).expand(parameter.numel())
                name = f"{prefix}.{key}" if prefix else key
                module.register_parameter(key, place(name, zeros, parameter))


def draw(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """A module's own parameters drawn anew, always in float32 on the CPU: the same on every device.

    Raises:
        ModelError: The module has no ``reset_parameters``.
    """
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        raise ModelError(f"{type(module).__name__} has parameters and cannot draw them", rule="reset_parameters does")
    for key, parameter in list(module.named_parameters(recurse=False)):
        module.register_parameter(key, nn.Parameter(torch.empty(parameter.shape)))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        reset()
    return {key: parameter.detach() for key, parameter in module.named_parameters(recurse=False)}


def load_whole(device: torch.device) -> Place:
    """Places whole parameters on a device, each a copy of its value."""

    def place(_name: str, value: Tensor, like: nn.Parameter) -> nn.Parameter:
        whole = value.to(device, like.dtype, copy=True).reshape(like.shape)
        return nn.Parameter(whole, requires_grad=like.requires_grad)

    return place


def load_slices(device: torch.device, sharded: Collection[str], cutter: Cutter) -> Place:
    """Places the ``sharded`` parameters as this rank's part of them, all others whole."""
    whole = load_whole(device)

    def place(name: str, value: Tensor, like: nn.Parameter) -> nn.Parameter:
        return cutter.cut(value, like) if name in sharded else whole(name, value, like)

    return place


def settle(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Moves and casts what is whole; deepspeed 0.19.8 does neither for a model that has cut parameters.

    One engine holds one dtype, so heads that compute in float32 keep their weights in ``dtype`` as well.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            # Weights that are stored in 8 bits are no numbers of a precision.
            parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
