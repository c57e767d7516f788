"""ZeRO-3's gradients on their way from the backward pass to the sums that the update reads.

Every byte on this way is moved for each parameter in each micro-batch. Here a gradient is read where the backward pass
left it and written once, into the message to the other ranks or, on a single rank, into the sum itself.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from piip_scale.engine.zero.deepspeed_api import load
from piip_scale.engine.zero.message_clock import MESSAGES
from piip_scale.engine.zero.replicas import Replicas, SumsAcross

HELD_IN_FLIGHT = 2
"""Messages under way whose gradients are still held: what is computed meanwhile hides one, not more."""


class GradientSums:
    """Sums the gradients of micro-batches and ranks, in the place of an optimiser's own methods for it.

    Gradients wait for a message of DeepSpeed's ``reduce_bucket_size``, in DeepSpeed's ``communication_data_type``; they
    are summed and not divided by the ranks, which the update does once instead. Collective, where there are ranks.

    Args:
        optimizer: DeepSpeed's of stage 3, its state in the device's memory.
        replicas: Where its ranks hold one of several copies; these sum theirs as the step's last micro-batch goes on.

    Attributes:
        total: This rank's slices of all trained parameters' sums end to end, in the order of the sub-groups, float32.
        num_ranks: Among which each parameter is cut.
        num_summed: Ranks whose gradients they hold, to be divided by.
    """

    def __init__(self, optimizer: Any, replicas: Replicas | None = None) -> None:
        comm = load().comm
        self._optimizer, self._reduce_scatter = optimizer, comm.reduce_scatter_fn
        self._group = optimizer.dp_process_group
        self.num_ranks: int = comm.get_world_size(group=self._group)
        self.total: Tensor = optimizer.grad_partitions_flat_buffer
        self._sums = self._own_sums(comm.get_rank(group=self._group))
        self._ready: list[Any] = []
        self._numel = 0
        self._lane = Lane(optimizer.reduce_and_partition_stream)
        self.num_summed: int = self.num_ranks * (replicas.num_replicas if replicas else 1)
        self._across = SumsAcross(replicas, optimizer.communication_data_type) if replicas else None

    def attach(self) -> None:
        """Hooks the parameters in the optimiser's place. Its bucket, which nobody fills any more, is freed.

        deepspeed 0.19.8 counts at each gradient how many are still to come, which only a backward pass that the engine
        does not begin itself needs to know.
        """
        optimizer = self._optimizer
        for handle in (*optimizer._grad_acc_hooks, *optimizer._leaf_module_hooks):
            handle.remove()
        in_leaf = {parameter.ds_id for parameters in optimizer.leaf_parameters.values() for parameter in parameters}
        for parameter in (parameter for group in optimizer.fp16_groups for parameter in group):
            if parameter.requires_grad and parameter.ds_id not in in_leaf:
                parameter.register_post_accumulate_grad_hook(self.add)
        for leaf, parameters in optimizer.leaf_parameters.items():
            leaf.register_full_backward_hook(functools.partial(self._add_all, parameters))
        optimizer.independent_gradient_partition_epilogue = self.finish
        for bucket in optimizer.ipg_buckets.values():
            bucket.buffer = None

    def _add_all(self, parameters: Sequence[Any], *_: object) -> None:
        """Takes over the gradients of a leaf, when its backward pass is through: zeros where there are none."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.add(parameter)

    def add(self, parameter: Any) -> None:
        """Takes over the gradient of one of DeepSpeed's parameters, whole and of this rank alone."""
        numel = parameter.ds_numel
        if self._numel + numel > self._optimizer.reduce_bucket_size:
            self._send()
        self._ready.append(parameter)
        self._numel += numel

    def finish(self) -> None:
        """Ends a micro-batch: all sums are whole to whatever the device runs next. The host does not wait."""
        self._send()
        if self._across:
            with self._lane.carry(()):
                self._across.finish()
        with MESSAGES.still(self.total.device):
            self._lane.join()
        self._optimizer._epilogue_ran_this_backward = True

    def _send(self) -> None:
        if not self._ready:
            return
        # Hooks may come in another order on other ranks.
        parameters = sorted(self._ready, key=lambda parameter: parameter.ds_id)
        gradients = [parameter.grad for parameter in parameters]
        self._ready, self._numel = [], 0
        for parameter in parameters:
            parameter.grad = None
        with self._lane.carry(gradients), torch.no_grad():
            self._sum(parameters, gradients if self.num_ranks == 1 else self._over_ranks(parameters, gradients))

    def _over_ranks(self, parameters: Sequence[Any], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """This rank's slice of each gradient, summed over the ranks, padding behind it; each (N,)."""
        lengths = [parameter.partition_numel() for parameter in parameters]
        dtype, device = self._optimizer.communication_data_type, gradients[0].device
        message_RN = torch.empty(self.num_ranks, sum(lengths), dtype=dtype, device=device)
        for gradient, slices_RN in zip(gradients, message_RN.split(lengths, dim=1), strict=True):
            cut_into_rows(gradient.reshape(-1), slices_RN)
        own = torch.empty(sum(lengths), dtype=dtype, device=device)
        with MESSAGES.still(device):
            self._reduce_scatter(own, message_RN.view(-1), group=self._group)
        slices: Sequence[Tensor] = own.split(lengths)
        return slices

    def _sum(self, parameters: Sequence[Any], slices: Sequence[Tensor]) -> None:
        held = [(self._sums[parameter.ds_id], part) for parameter, part in zip(parameters, slices, strict=True)]
        sums = [own for own, _ in held if own.numel()]
        parts = [part if part.numel() == own.numel() else part[: own.numel()] for own, part in held if own.numel()]
        if sums:
            # The first micro-batch of a step begins its sums: nothing has to be zeroed.
            is_first = self._optimizer.micro_step_id == 0
            (torch._foreach_copy_ if is_first else torch._foreach_add_)(sums, parts)
            if self._across and self._optimizer.is_gradient_accumulation_boundary():
                self._across.begin(sums)

    def _own_sums(self, rank: int) -> dict[int, Tensor]:
        """Of each parameter the part of the total that this rank holds, without padding, by DeepSpeed's number.

        Flat; on a single rank of the parameter's shape.
        """
        found, start = {}, 0
        for parameter in (parameter for group in self._optimizer.fp16_groups for parameter in group):
            length = parameter.partition_numel()
            real = min(max(parameter.ds_numel - rank * length, 0), length)
            own = self.total.narrow(0, start, real)
            found[parameter.ds_id] = own.view(parameter.ds_shape) if self.num_ranks == 1 else own
            start += length
        return found


def cut_into_rows(flat: Tensor, rows_RN: Tensor) -> None:
    """Writes a flat tensor's elements row after row; what is left of the rows stays as it is.

    Args:
        flat: At most as many elements as the rows have.
        rows_RN: A view of any strides; its dtype is converted to.
    """
    length = rows_RN.shape[1]
    whole, rest = divmod(flat.numel(), length)
    rows_RN[:whole].copy_(flat[: whole * length].view(whole, length))
    if rest:
        rows_RN[whole, :rest].copy_(flat[whole * length :])


class Lane:
    """A stream of the device beside that of the backward pass; ``None`` for a device that has none.

    Of two streams each waits for the other on the device, where the host would wait with DeepSpeed's ``synchronize``.
    Gradients are held until the backward pass's stream is behind their message, so that their memory is not used
    again before.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._flying: deque[tuple[torch.cuda.Event, Sequence[Tensor]]] = deque()

    @contextmanager
    def carry(self, gradients: Sequence[Tensor]) -> Iterator[None]:
        """What is launched inside comes after what was launched before, and beside what is launched later."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        while len(self._flying) >= HELD_IN_FLIGHT:
            self._land()
        with torch.cuda.stream(self._stream):
            yield
            self._flying.append((self._stream.record_event(), gradients))

    def join(self) -> None:
        """What is launched from now on comes after all that was carried."""
        while self._flying:
            self._land()

    def _land(self) -> None:
        event, _ = self._flying.popleft()
        torch.cuda.current_stream().wait_event(event)
