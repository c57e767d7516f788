"""Parameters and optimiser state on a local disk: what DeepSpeed needs, and what of it has to be put right.

Source: DeepSpeed 0.19.8, whose ``swap_tensor`` folder moves slices of at least 1 MiB.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from piip_scale.config.zero import ZeroConfig
from piip_scale.engine.zero.deepspeed_api import Engine, private
from piip_scale.engine.zero.extensions import load_extension
from piip_scale.errors import ConfigError

# Of this process, until it ends.
_held: dict[Path, TextIO] = {}


def prepare_disks(zero: ZeroConfig) -> None:
    """Takes this rank's place on each disk that the config names, and loads DeepSpeed's driver. Not collective.

    Raises:
        ConfigError: Another run has the place.
        KernelError: The driver cannot be built.
    """
    fields = {"offload_optimizer": zero.offload_optimizer, "offload_parameters": zero.offload_parameters}
    disks = {f"zero.{name}={place!r}": Path(place) for name, place in fields.items() if place not in ("none", "cpu")}
    if not disks:
        return
    for field, folder in disks.items():
        _hold(folder, field)
        load_extension(private("deepspeed.ops.op_builder:AsyncIOBuilder")(), field)
    _repair()


def _hold(folder: Path, field: str) -> None:
    """Files there are named after ranks, not after runs: a second run would write into them."""
    path = folder / f"rank_{dist.get_rank()}.lock"
    if path in _held:
        return
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"{field} is in use by another run",
            rule="each run needs a folder of its own",
            fix="name another folder, or wait for that run to end",
        ) from None
    _held[path] = file


def _repair() -> None:
    """Puts DeepSpeed's swapper of parameters right, once in a process."""
    init = private("deepspeed.runtime.zero.partition_parameters:InsertPostInitMethodToModuleSubClasses")
    init._set_dtype = _set_dtype
    swapper = private("deepspeed.runtime.swap_tensor.partitioned_param_swapper:AsyncPartitionedParameterSwapper")
    begin = swapper.__init__
    if begin.__module__ != __name__:
        swapper.__init__ = _begin_without_residents(begin)


def _set_dtype(init: Any, ds_config: Any, dtype: torch.dtype | None) -> None:
    """Replaces zero.Init's, which on a CPU passes over ``dtype``, so that disks got fp32 weights in bf16."""
    in_bf16 = ds_config is not None and ds_config.bfloat16_config.enabled
    init.dtype = dtype or (torch.bfloat16 if in_bf16 else torch.float32)


def _begin_without_residents(begin: Callable[..., None]) -> Callable[..., None]:
    """Leaves slices of resident parameters in memory: on disk, each would keep one of a few buffers for good."""

    def begin_without_residents(swapper: Any, ds_config: Any, model_dtype: torch.dtype) -> None:
        begin(swapper, ds_config, model_dtype)
        slice_numel = -(-ds_config.zero_config.param_persistence_threshold // dist.get_world_size())
        swapper.min_aio_bytes = max(swapper.min_aio_bytes, (slice_numel + 1) * swapper.swap_element_size)

    return begin_without_residents


def read_once(engine: Engine) -> None:
    """Has no parameter read from a disk twice at once.

    DeepSpeed looks ahead for parameters to read, and where the forward pass turns into the backward pass meets the
    last ones twice.
    """
    swapper = next(engine.module.parameters()).nvme_swapper
    if swapper is not None:
        swap_in = swapper.swap_in
        swapper.swap_in = lambda params, *args, **kwargs: swap_in(list(dict.fromkeys(params)), *args, **kwargs)


def swapped_files(engine: Engine) -> list[tuple[int, str] | None]:
    """For each sub-group of an engine whose optimiser is on a disk, elements and where a checkpoint has its files.

    ``None`` for sub-groups that are in memory. The place is a path inside DeepSpeed's folder of the checkpoint, up to
    the file's name without its ending; a state's file has the state's name and a hyphen before that name.
    """
    optimizer, rank = engine.optimizer, dist.get_rank()
    return [
        (int(numel), f"offloaded_tensors/rank{rank:02d}/{master.ds_id}") if is_on_disk(engine, index) else None
        for index, (master, numel) in enumerate(
            zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat_numel, strict=True)
        )
    ]


def is_on_disk(engine: Engine, sub_group: int) -> bool:
    """Whether a sub-group's master weights and optimiser state are on a disk between steps."""
    optimizer = engine.optimizer
    return engine.zero_optimization_stage() == 3 and bool(optimizer._swappable_optimizer_subgroup(sub_group))
