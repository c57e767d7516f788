"""The flat fp32 tensors that DeepSpeed's optimisers update, seen the same way in every ZeRO stage.

Everything that reads or writes master weights beside the optimiser (resuming, averaging) goes through here, so there is
one place to look at when DeepSpeed moves its attributes. Source: stages 0 to 3 of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piip_scale.checkpoint.slices import Slice, rank_slice, whole
from piip_scale.engine.zero.deepspeed_api import Engine, private
from piip_scale.engine.zero.disk_offload import is_on_disk


@dataclass(frozen=True)
class Partition:
    """This rank's part of an optimiser group.

    Attributes:
        master: The weights that the optimiser updates, float32 1-D, live; without ZeRO a parameter, of any shape.
        slices: Which elements of which parameters they are; what lies between them is padding.
        settings: The optimiser group it belongs to, live.
        state: The optimiser's state of it, live; empty before the first step.
    """

    master: Tensor
    slices: tuple[Slice, ...]
    settings: dict[str, Any]
    state: dict[str, Any]


def partitions(engine: Engine) -> list[Partition]:
    """This rank's master weights, in the order in which checkpoints hold them. Not collective."""
    inner = _inner_optimizer(engine)
    return [
        Partition(master, tuple(slices), inner.param_groups[group], inner.state[master])
        for master, group, slices in _flat_tensors(engine)
    ]


def partitions_in_memory(engine: Engine) -> Iterator[Partition]:
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


def _flat_tensors(engine: Engine) -> Iterator[tuple[Tensor, int, Iterable[Slice]]]:
    """Each tensor with its optimiser group and slices."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        for index, group in enumerate(_inner_optimizer(engine).param_groups):
            for parameter in group["params"]:
                yield parameter, index, [whole(engine.param_names[parameter], parameter.numel())]
        return
    if engine.zero_optimization_stage() == 3:
        for index, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            slices = _cut_parameters(engine, optimizer.fp16_groups[index])
            yield master, optimizer.sub_group_to_group_id[index], slices
        return
    if hasattr(optimizer, "bf16_groups"):  # stage 1 with fp32 gradients has an optimiser of its own
        masters, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
    else:
        masters, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
    for index, (master, group) in enumerate(zip(masters, groups, strict=True)):
        yield master, index, _cut_group(engine, group)


def frozen_parts(engine: Engine) -> Iterator[tuple[Slice, Tensor]]:
    """This rank's share of the parameters that are not trained, live: all of each below stage 3. Not collective.

    One that lives on a disk is in memory until the next is due.
    """
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_tensor"):
            yield from _in_memory(_own_slice(engine, name, parameter), parameter)
        else:
            yield whole(name, parameter.numel()), parameter.data.view(-1)


def _in_memory(part: Slice, parameter: Any) -> Iterator[tuple[Slice, Tensor]]:
    status = private("deepspeed.runtime.swap_tensor.partitioned_param_swapper:PartitionedParamStatus")
    away = parameter.ds_tensor.status == status.NOT_AVAILABLE
    if away:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    yield part, parameter.ds_tensor.data
    if away:
        parameter.nvme_swapper.swap_out_and_release([parameter])


def publish(engine: Engine) -> None:
    """Has the weights that the model computes with follow the masters (and frozen parts) on all ranks. Collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        # As around DeepSpeed's own loading: what is gathered, the resident parameters too, is stale.
        optimizer.checkpoint_event_prologue()
        _drop_second_copies(engine)
        for sub_group in (index for index in range(len(optimizer.fp16_groups)) if not is_on_disk(engine, index)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()


def _drop_second_copies(engine: Engine) -> None:
    """Has hpZ make its second copies anew, from what the slices are now.

    deepspeed 0.19.8 drops those of trained parameters only, and takes the others for good from the first time they
    were whole; after a resume that is what stood there before the checkpoint was read.
    """
    for parameter in engine.module.parameters():
        parameter.ds_secondary_tensor = None


def _inner_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """Torch's own inside DeepSpeed's."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def _cut_parameters(engine: Engine, group: Sequence[Any]) -> Iterator[Slice]:
    """Stage 3: each parameter is cut by itself, and the parts lie end to end."""
    start = 0
    for parameter in group:
        held = _own_slice(engine, engine.param_names[parameter], parameter, start)
        if held.length:
            yield held
        start += parameter.partition_numel()


def _own_slice(engine: Engine, name: str, parameter: Any, start: int = 0) -> Slice:
    rank = engine.optimizer._get_param_partition_rank(parameter)
    return rank_slice(name, parameter.ds_numel, parameter.partition_numel(), rank, start=start)


def _cut_group(engine: Engine, group: Sequence[Any]) -> Iterator[Slice]:
    """Stages 1 and 2: the parameters lie end to end and the whole is cut; DeepSpeed knows where each one's part is."""
    for parameter in group:
        mapping = parameter._hp_mapping
        if mapping is not None:
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Slice(engine.param_names[parameter], here.start, there.start, there.numel)
