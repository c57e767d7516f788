"""The flat fp32 tensors that DeepSpeed's optimisers update, seen the same way in every ZeRO stage.

Everything that reads or writes master weights beside the optimiser (resuming, averaging) goes through here, so there is
one place to look at when DeepSpeed moves its attributes. Source: stages 0 to 3 of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from piip_scale.engine.zero.disk_offload import is_on_disk

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Span:
    """Consecutive elements of one parameter inside a flat tensor; what lies between spans is padding.

    Attributes:
        name: The parameter's, as in ``named_parameters()``.
        source: First element in the flattened parameter.
        start: First element in the flat tensor.
        length: Elements.
    """

    name: str
    source: int
    start: int
    length: int


@dataclass(frozen=True)
class Partition:
    """This rank's part of an optimiser group.

    Attributes:
        master: The weights that the optimiser updates, float32 1-D, live; without ZeRO a parameter, of any shape.
        spans: Which elements of which parameters they are.
        settings: The optimiser group it belongs to, live.
        state: The optimiser's state of it, live; empty before the first step.
    """

    master: Tensor
    spans: tuple[Span, ...]
    settings: dict[str, Any]
    state: dict[str, Any]


def partitions(engine: DeepSpeedEngine) -> list[Partition]:
    """This rank's master weights, in the order in which checkpoints hold them. Not collective."""
    inner = _inner_optimizer(engine)
    return [
        Partition(master, tuple(spans), inner.param_groups[group], inner.state[master])
        for master, group, spans in _flat_tensors(engine)
    ]


def partitions_in_memory(engine: DeepSpeedEngine) -> Iterator[Partition]:
    """``partitions``, each while its tensors are in memory; those that live on a disk go back when the next is due.

    Not collective. Changes to the master weights of those on a disk reach the weights that the model computes with
    here, those of all others by ``publish``.
    """
    for index, partition in enumerate(partitions(engine)):
        if not is_on_disk(engine, index):
            yield partition
            continue
        engine.optimizer._optimizer_states_and_gradient_swap_in(index)
        yield partition
        engine.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        engine.optimizer._optimizer_states_and_gradient_swap_out(index)


def _flat_tensors(engine: DeepSpeedEngine) -> Iterator[tuple[Tensor, int, Iterable[Span]]]:
    """Each tensor with its optimiser group and spans."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        for index, group in enumerate(_inner_optimizer(engine).param_groups):
            for parameter in group["params"]:
                yield parameter, index, [Span(engine.param_names[parameter], 0, 0, parameter.numel())]
        return
    if engine.zero_optimization_stage() == 3:
        for index, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            spans = _cut_parameters(engine, optimizer.fp16_groups[index])
            yield master, optimizer.sub_group_to_group_id[index], spans
        return
    if hasattr(optimizer, "bf16_groups"):  # stage 1 with fp32 gradients has an optimiser of its own
        masters, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
    else:
        masters, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
    for index, (master, group) in enumerate(zip(masters, groups, strict=True)):
        yield master, index, _cut_group(engine, group)


def frozen_parts(engine: DeepSpeedEngine) -> Iterator[tuple[Span, Tensor]]:
    """This rank's share of the parameters that are not trained, live: all of each below stage 3. Not collective.

    One that lives on a disk is in memory until the next is due.
    """
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_tensor"):
            part = parameter.partition_numel()
            source = part * engine.optimizer._get_param_partition_rank(parameter)
            span = Span(name, source, 0, max(min(part, parameter.ds_numel - source), 0))
            yield from _in_memory(span, parameter)
        else:
            yield Span(name, 0, 0, parameter.numel()), parameter.data.view(-1)


def _in_memory(span: Span, parameter: Any) -> Iterator[tuple[Span, Tensor]]:
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    away = parameter.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE
    if away:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    yield span, parameter.ds_tensor.data
    if away:
        parameter.nvme_swapper.swap_out_and_release([parameter])


def publish(engine: DeepSpeedEngine) -> None:
    """Has the weights that the model computes with follow the masters (and frozen parts) on all ranks. Collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        # As around DeepSpeed's own loading: what is gathered, the resident parameters too, is stale.
        optimizer.checkpoint_event_prologue()
        for sub_group in (index for index in range(len(optimizer.fp16_groups)) if not is_on_disk(engine, index)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()


def _inner_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """Torch's own inside DeepSpeed's."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def _cut_parameters(engine: DeepSpeedEngine, group: Sequence[Any]) -> Iterator[Span]:
    """Stage 3: each parameter is cut by itself, and the parts lie end to end."""
    start = 0
    for parameter in group:
        part = parameter.partition_numel()
        source = part * engine.optimizer._get_param_partition_rank(parameter)
        length = min(part, parameter.ds_numel - source)
        if length > 0:
            yield Span(engine.param_names[parameter], source, start, length)
        start += part


def _cut_group(engine: DeepSpeedEngine, group: Sequence[Any]) -> Iterator[Span]:
    """Stages 1 and 2: the parameters lie end to end and the whole is cut; DeepSpeed tells where each one's part is."""
    for parameter in group:
        mapping = parameter._hp_mapping
        if mapping is not None:
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Span(engine.param_names[parameter], here.start, there.start, there.numel)
