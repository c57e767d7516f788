"""ZeRO-3's resident parameters: whole on every rank, from the first step to the last.

DeepSpeed (0.19.8) cuts all of them before each update and makes them whole again behind it, one by one: some 0.1 ms a
parameter, and PIIP-H6B has 1,510. Here they keep their memory, into which what the update changed is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from piip_scale.engine.zero.deepspeed_api import Engine, load, private
from piip_scale.engine.zero.plan import BUCKET_ELEMENTS


class Residents:
    """The resident parameters of an engine of stage 3 whose slices are in the device's memory.

    Args:
        engine: The engine.
    """

    def __init__(self, engine: Engine) -> None:
        optimizer = engine.optimizer
        self._status = private("deepspeed.runtime.zero.partition_parameters:ZeroParamStatus")
        self._parameters: list[Any] = list(optimizer.persistent_parameters)
        self._sharded = [parameter for parameter in engine.module.parameters() if not parameter.ds_persist]
        self._coordinator = optimizer.parameter_offload.get_param_coordinator()
        self._comm, self._group = load().comm, optimizer.dp_process_group
        self._num_ranks: int = self._comm.get_world_size(group=self._group)
        self._rank: int = self._comm.get_rank(group=self._group)
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        self._messages = {False: self._messages_of(self._parameters), True: self._messages_of(trained)}

    def attach(self, optimizer: Any) -> None:
        """Has DeepSpeed's own ways to cut parameters leave residents whole, and to make residents whole come here."""
        optimizer._partition_all_parameters = self.cut_others
        if self._parameters:
            self._parameters[0].all_gather = self._gather_for_deepspeed

    def cut_others(self) -> None:
        """Ends a pass: no sharded parameter is whole any more. Not collective."""
        for parameter in self._parameters:
            parameter.ds_active_sub_modules.clear()
        self._coordinator.release_and_reset_all(_Whole(self._sharded, self._status.NOT_AVAILABLE))

    def gather(self, changed_by_update: bool = False) -> None:
        """Has residents be what their slices are now. Collective, where there are ranks.

        Args:
            changed_by_update: Only those that are trained.
        """
        for message in self._messages[changed_by_update]:
            for parameter in message.parameters:
                parameter.ds_status = self._status.AVAILABLE
            if self._num_ranks == 1:
                _see_slices(message.parameters)
            else:
                message.place()
                message.fill(self._over_ranks(message))

    def _gather_for_deepspeed(self, *_: object, **__: object) -> None:
        self.gather()

    def _messages_of(self, parameters: Sequence[Any]) -> list[_Message]:
        bundles: list[list[Any]] = [[]]
        # One dtype a message: weights may be stored in 8 bits.
        for parameter in sorted(parameters, key=lambda parameter: str(parameter.dtype)):
            held = sum(each.ds_numel for each in bundles[-1])
            is_other = bool(bundles[-1]) and bundles[-1][0].dtype != parameter.dtype
            if bundles[-1] and (is_other or held + parameter.ds_numel > BUCKET_ELEMENTS):
                bundles.append([])
            bundles[-1].append(parameter)
        return [_Message(bundle) for bundle in bundles if bundle]

    def _over_ranks(self, message: _Message) -> Tensor:
        """Every rank's slices end to end, (ranks, N)."""
        slices = [parameter.ds_tensor for parameter in message.parameters]
        everyones_RN: Tensor = slices[0].new_empty(self._num_ranks, sum(message.lengths))
        own_N = torch.cat(slices, out=everyones_RN[self._rank])
        self._comm.allgather_fn(everyones_RN.view(-1), own_N, group=self._group, async_op=True).wait()
        return everyones_RN


class _Message:
    """Residents that travel together."""

    def __init__(self, parameters: Sequence[Any]) -> None:
        self.parameters = parameters
        self.lengths: list[int] = [parameter.partition_numel() for parameter in parameters]
        self._addresses: list[int] = []
        self._places: list[tuple[Tensor, Tensor | None]] = []

    def place(self) -> None:
        """Gives those memory that have none."""
        # DeepSpeed cuts and gathers single ones, too, as at the heads while it records an order of modules.
        if self._addresses == [parameter.data_ptr() for parameter in self.parameters]:
            return
        for parameter in self.parameters:
            if parameter.shape != parameter.ds_shape:
                parameter.data = parameter.ds_tensor.new_empty(parameter.ds_shape)
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]
        pairs = zip(self.parameters, self.lengths, strict=True)
        self._places = [_rows(parameter.data.view(-1), length) for parameter, length in pairs]

    def fill(self, everyones_RN: Tensor) -> None:
        """Copies every rank's slices into the parameters."""
        to, source = [], []
        for (rows, rest), slices_RN in zip(self._places, everyones_RN.split(self.lengths, dim=1), strict=True):
            to.append(rows)
            source.append(slices_RN if len(rows) == len(slices_RN) else slices_RN[: len(rows)])
            if rest is not None:
                to.append(rest)
                source.append(slices_RN[len(rows), : len(rest)])
        torch._foreach_copy_(to, source)


def _rows(flat: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
    """A flat tensor as rows, and what is left behind the last whole one."""
    whole, rest = divmod(flat.numel(), length)
    return flat[: whole * length].view(whole, length), flat[whole * length :] if rest else None


def _see_slices(parameters: Iterable[Any]) -> None:
    """On one rank a slice is all of its parameter, which needs no memory of its own."""
    for parameter in parameters:
        if parameter.data_ptr() != parameter.ds_tensor.data_ptr() or parameter.shape != parameter.ds_shape:
            parameter.data = parameter.ds_tensor.data.view(parameter.ds_shape)


class _Whole:
    """Those of some parameters that are not cut, in the form in which DeepSpeed looks through a module."""

    def __init__(self, parameters: Iterable[Any], cut: object) -> None:
        self._parameters = [each for each in parameters if each.ds_status != cut or each.ds_active_sub_modules]

    def named_parameters(self, recurse: bool) -> Iterator[tuple[str, nn.Parameter]]:
        """Each, without its name."""
        return (("", parameter) for parameter in self._parameters)

    def ds_external_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """None."""
        return ()
