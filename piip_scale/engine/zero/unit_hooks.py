"""ZeRO-3's hooks where there is something to gather: one set for each unit of the network, none inside.

Source: DeepSpeed 0.19.8, which hooks every module, and fetches and releases at each what it owns itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from piip_scale.engine.zero.deepspeed_api import Engine, load
from piip_scale.engine.zero.kept_weights import keeping_parameters
from piip_scale.models.unit import units_of


def hook_units(engine: Engine, leaf: nn.Module) -> None:
    """Has ZeRO-3 gather and release a unit's sharded parameters together, at the unit's call.

    Modules inside units lose their hooks, and so do those that own nothing sharded: there is nothing to fetch or
    release for them, and a hooked module costs some 0.5 ms a step. Gradients are reduced by hooks on parameters, which
    stay, as do the leaf's. Nor does the whole model keep any: a tensor that it returns, a loss, may be missing on some
    ranks in a step, as without a RoI head, and DeepSpeed counts a call of the backward pass for each. Residents belong
    to no hook; one that is away after all comes when it is read (DeepSpeed's parameter dict sees to that).
    """
    inside: set[int] = set()
    copies = _gathers_copies(engine.optimizer)
    for unit in units_of(engine.module):
        sharded = list(filter(_is_sharded, unit.parameters()))
        for parameter in sharded:
            load().zero.register_external_parameter(unit, parameter)
        if sharded and copies and not unit.checkpointed:
            unit.replace_computation(functools.partial(keeping_parameters, parameters=sharded))
        inside |= {id(module) for module in unit.modules() if module is not unit}
    without: set[int] = set()
    for module in engine.module.modules():
        if module is not leaf and (id(module) in inside or not any(map(_is_sharded, _fetched(module)))):
            without |= _hooks_of(module)
    offload = engine.optimizer.parameter_offload
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        if id(handle.hooks_dict_ref()) in without:
            handle.remove()
    _look_up_plainly(engine)


def _gathers_copies(optimizer: Any) -> bool:
    """Whether a gathered parameter has memory beside its slices."""
    num_ranks: int = load().comm.get_world_size(group=optimizer.dp_process_group)
    return num_ranks > 1 or bool(optimizer.offload_param)


def _look_up_plainly(engine: Engine) -> None:
    """Gives modules their dicts of parameters back.

    DeepSpeed's gather what is missing when it is read, in passes whose begin and end every module hears of: nothing
    is missing here.
    """
    for module in engine.module.modules():
        module._parameters = dict(module._parameters.items())
    for name in ("_forward_prologue", "_forward_epilogue"):
        setattr(engine, name, _without_walk(engine, getattr(engine, name)))


def _without_walk(engine: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    def instead(*args: Any) -> Any:
        engine.zero_optimization_partition_weights = lambda: False
        try:
            return method(*args)
        finally:
            del engine.zero_optimization_partition_weights

    return instead


def _fetched(module: Any) -> Iterator[nn.Parameter]:
    """What ZeRO-3 fetches at the call of a module that is no leaf."""
    yield from module.parameters(recurse=False)
    yield from (parameter for _, parameter in module.ds_external_parameters())


def _is_sharded(parameter: Any) -> bool:
    return not parameter.ds_persist


def _hooks_of(module: nn.Module) -> set[int]:
    return {id(module._forward_pre_hooks), id(module._forward_hooks)}
