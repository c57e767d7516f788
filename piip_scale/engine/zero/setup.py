"""Bringing the ranks together and wrapping a model into a DeepSpeed engine."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from piip_scale.config.run import RunConfig
from piip_scale.engine.compiling import compile_blocks, compile_line, compiles
from piip_scale.engine.determinism import determinism_lines
from piip_scale.engine.fp32_precision import fp32_precision_lines
from piip_scale.engine.optim import build_optimizer, build_param_groups, group_lines
from piip_scale.engine.report import start_report
from piip_scale.engine.start_weights import log_notes, start_weights
from piip_scale.engine.zero.building import (
    Cutter,
    Place,
    fill,
    fill_blank,
    load_slices,
    load_whole,
    settle,
)
from piip_scale.engine.zero.checks import checked_plan
from piip_scale.engine.zero.deepspeed_api import Engine, load, private
from piip_scale.engine.zero.disk_offload import prepare_disks, read_once
from piip_scale.engine.zero.plan import BUCKET_ELEMENTS, Sharding, Sizes
from piip_scale.engine.zero.replicas import Replicas
from piip_scale.engine.zero.unit_hooks import hook_units
from piip_scale.engine.zero.update import shorten_update
from piip_scale.errors import ModelError, WorldError
from piip_scale.logging import get_logger
from piip_scale.run.starting import StartClock
from piip_scale.tasks.base import Task, TrainableModel
from piip_scale.world import World

# Gives a model of the plan's sizes its first values.
Give = Callable[[nn.Module, RunConfig, Sizes, Sharding, torch.device, dist.ProcessGroup | None], None]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_device(world: World) -> torch.device:
    """This rank's GPU, or the CPU on a machine without one; makes it the current device.

    Raises:
        WorldError: The node has GPUs, but fewer than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise WorldError(
            f"local rank {world.local_rank} has no GPU of its own",
            value=torch.cuda.device_count(),
            rule=f"{world.ranks_per_node} ranks on a node need as many visible GPUs",
            fix="start fewer processes, or unset CUDA_VISIBLE_DEVICES",
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def init_distributed(world: World, timeout: timedelta | None = None) -> torch.device:
    """Joins the ranks, also where there is only one, and returns this rank's device. Collective.

    Works without compiler and ninja: DeepSpeed's one extension for CPUs is left out.

    Args:
        world: The ranks.
        timeout: Longest that a collective may wait for the others; ``None`` leaves it to torch, which gives NCCL 10
            minutes and gloo 30. Groups that are made later have torch's until ``set_group_timeouts``.

    Raises:
        KernelError: DeepSpeed or torch is of another version than can train.
        WorldError: The node has GPUs, but fewer than ranks.
    """
    device = choose_device(world)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # DeepSpeed reads these at import and in initialize(), torch only through the arguments below.
    os.environ |= world.as_environment() | {"DS_ACCELERATOR": device.type}
    if timeout is not None:
        _quiet_nccl_monitor(timeout)
    bound = device if device.type == "cuda" else None
    if world.num_ranks == 1:
        alone = dist.HashStore()  # type: ignore[attr-defined]  # no port that somebody else may have taken
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, device_id=bound, timeout=timeout)
    else:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{world.master_address}:{world.master_port}",
            rank=world.rank,
            world_size=world.num_ranks,
            device_id=bound,
            timeout=timeout,
        )
    load().init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return device


def _quiet_nccl_monitor(timeout: timedelta) -> None:
    """Has NCCL's own monitor, which ends a process after 8 minutes without a sign, wait as long as collectives may.

    Who has set it by hand keeps it.
    """
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(timeout.total_seconds())))


def build_model(task: Task, seed: int) -> nn.Module:
    """The task's model, the same on every rank; what it leaves on the meta device ``build_engine`` gives values."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return task.build_model()


def build_engine(
    model: nn.Module, config: RunConfig, world: World, clock: StartClock | None = None, give: Give | None = None
) -> tuple[Engine, Sharding]:
    """Gives the model its first weights, marks the leaf, groups the parameters and hands all to DeepSpeed. Collective.

    Prints the start report on the main rank.

    Args:
        model: A ``TrainableModel``, alike on all ranks. Parameters on the meta device are drawn or read here, under
            ZeRO-3 each rank's share only.
        config: The run.
        world: The ranks.
        clock: Notes the end of the phases ``weights`` and ``shard``.
        give: Gives what is on the meta device its values: ``give_weights``, or ``give_blanks`` before resuming.

    Raises:
        ConfigError: DeepSpeed refuses a raw key, or it contradicts ours.
        KernelError: Offloading to a disk, or compiling where the config asks for it, is not possible here.
        ModelError: The model's parts or rules do not fit its parameters, or pretrained weights do not fit the model.
    """
    trainable, clock = cast(TrainableModel, model), clock or StartClock()
    sizes, plan = checked_plan(model, config, world)
    prepare_disks(config.zero)
    device = choose_device(world)
    modes = [*determinism_lines(config.train, device), *fp32_precision_lines(config.train, device)]
    for line in [*start_report(sizes, plan), compile_line(config.train, device), *modes]:
        get_logger(__name__).info(line)
    trainable.set_precision(_DTYPES[config.train.precision])
    replicas = Replicas(device, plan.num_ranks) if plan.num_replicas > 1 else None
    (give or give_weights)(model, config, sizes, plan, device, replicas.shard if replicas else None)
    clock.end_phase("weights")
    groups = build_param_groups(model, trainable.parameter_rules(), trainable.num_layers, config.optimizer)
    for line in ["optimiser groups", *group_lines(groups)]:
        get_logger(__name__).info(line)
    _mark_leaf(model, trainable.heads_module())
    engine = _initialize(model, build_optimizer(groups, config.optimizer), plan.deepspeed, replicas)
    if plan.stage == 3:
        _gather_residents_together(engine)
        hook_units(engine, trainable.heads_module())
        read_once(engine)
        shorten_update(engine)
        gather_residents(engine)
    if compiles(config.train, device):
        compile_blocks(model)
    clock.end_phase("shard")
    return engine, plan


def give_weights(
    model: nn.Module,
    config: RunConfig,
    sizes: Sizes,
    plan: Sharding,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Reads the weights that the config names files for and draws the others; cuts what ZeRO-3 shards. Collective.

    Args:
        model: Of the plan's sizes, its parameters in the dtypes they shall have.
        config: The run.
        sizes: The model's.
        plan: Which parameters are cut.
        device: This rank's; parameters that have values stay where they are unless some are cut.
        group: Process group of the ranks among which they are cut; ``None`` for all.

    Raises:
        ModelError: Pretrained weights are absent or do not fit the model, or it cannot draw its own.
    """
    start = start_weights(model, config)
    log_notes(start)
    _give(model, config, sizes, plan, device, group, lambda place: fill(model, start.tensors, config.train.seed, place))


def give_blanks(
    model: nn.Module,
    config: RunConfig,
    sizes: Sizes,
    plan: Sharding,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> None:
    """As ``give_weights``, with zeros for what a checkpoint will replace: neither draws nor reads."""
    _give(model, config, sizes, plan, device, group, lambda place: fill_blank(model, place))


def _give(
    model: nn.Module,
    config: RunConfig,
    sizes: Sizes,
    plan: Sharding,
    device: torch.device,
    group: dist.ProcessGroup | None,
    fill_with: Callable[[Place], None],
) -> None:
    absent = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    sharded = absent & {parameter.name for parameter in sizes.parameters if plan.shards(parameter)}
    place = load_whole(device)
    if sharded:
        place = load_slices(device, sharded, Cutter(plan.deepspeed, group))
    fill_with(place)
    if sharded:
        settle(model, device, _DTYPES[config.train.precision])


def _gather_residents_together(engine: Engine) -> None:
    """Has ZeRO-3 gather its resident parameters in a few messages after each update, not one by one.

    deepspeed 0.19.8 calls ``all_gather`` of the first one with the list of all, which sends a message for each.
    """
    residents = engine.optimizer.persistent_parameters
    if residents:
        residents[0].all_gather = functools.partial(_gather_coalesced, residents[0])


def gather_residents(engine: Engine) -> None:
    """Makes ZeRO-3's resident parameters whole where they are not. Collective.

    deepspeed 0.19.8 does so after an update, but neither at the start nor after a step that was not applied.
    """
    residents = getattr(engine.optimizer, "persistent_parameters", [])
    if residents:
        residents[0].all_gather(residents)


def _gather_coalesced(first: nn.Parameter, param_list: Sequence[nn.Parameter] | None = None, **_: object) -> None:
    status = private("deepspeed.runtime.zero.partition_parameters:ZeroParamStatus")
    requested: Sequence[Any] = [first] if param_list is None else param_list
    missing = [param for param in requested if param.ds_status == status.NOT_AVAILABLE]
    for param in missing:
        # all_gather_coalesced would prefer hpZ's second copy, which at this point is that from before the update.
        param.ds_secondary_tensor = None
    while missing:
        taken, numel = 0, 0
        while taken < len(missing) and (taken == 0 or numel + missing[taken].ds_numel <= BUCKET_ELEMENTS):
            numel += missing[taken].ds_numel
            taken += 1
        missing[0].all_gather_coalesced(missing[:taken]).wait()
        missing = missing[taken:]


def _mark_leaf(model: nn.Module, leaf: nn.Module) -> None:
    """ZeRO-3 compares the modules called across ranks; inside a leaf it does not look."""
    if all(module is not leaf for module in model.modules()):
        raise ModelError("heads_module() is not a part of the model", rule="it must be a submodule")
    private("deepspeed.utils:set_z3_leaf_module")(leaf, True)
    leaf.register_forward_hook(_check_leaf_output)


def _check_leaf_output(leaf: nn.Module, _inputs: object, output: object) -> None:
    """Refuses what torch's backward hooks pass over: the leaf's gradients would stay each rank's own, silently."""
    tensors = output if isinstance(output, tuple) else (output,)
    if leaf.training and not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise ModelError(
            f"the forward of heads_module() ({type(leaf).__name__}) returned a {type(output).__name__}",
            rule="ZeRO reduces its gradients only if it returns a tensor or a tuple of tensors",
            fix="return a tuple, and name the losses outside the leaf",
        )


def _initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], replicas: Replicas | None
) -> Engine:
    # Ranks read their weights for as long as they need. They wait here, in the group with the run's limit, not in
    # those that DeepSpeed makes now, which have torch's 10 minutes until set_group_timeouts.
    dist.barrier()
    # deepspeed 0.19.8 keeps that of an engine for those that are built without one later.
    private("deepspeed.utils:groups").mpu = None
    engine, *_ = load().initialize(
        model=model, optimizer=optimizer, config=config, mpu=replicas, dist_init_required=False
    )
    return cast("Engine", engine)
