"""The one door to DeepSpeed: the only module that imports it, after a look at what is installed.

DeepSpeed promises nothing about most of what training with it needs, and a missing name would show late, or as other
numbers. So the versions and every private name are checked once, when DeepSpeed is first asked for; what stands in
place of its faults is listed in ``workarounds``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import re
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from piip_scale.errors import KernelError
from piip_scale.logging import get_logger

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    Engine: TypeAlias = DeepSpeedEngine
else:
    Engine = Any

TESTED = {"deepspeed": ("0.19.8", "0.19.8"), "torch": ("2.11", "2.15")}
"""Oldest and newest version of each library that the tests have trained with."""
_REFUSED_FROM = {"deepspeed": (0, 20)}

PRIVATE_NAMES = (
    "deepspeed.comm:reduce_scatter_fn",
    "deepspeed.ops.op_builder:AsyncIOBuilder",
    "deepspeed.ops:__compatible_ops__",
    "deepspeed.runtime.bf16_optimizer:BF16_Optimizer.update_lp_params",
    "deepspeed.runtime.config:DeepSpeedConfig",
    "deepspeed.runtime.config:DeepSpeedConfigError",
    "deepspeed.runtime.engine:DeepSpeedEngine._copy_recovery_script",
    "deepspeed.runtime.engine:DeepSpeedEngine._forward_epilogue",
    "deepspeed.runtime.engine:DeepSpeedEngine._forward_prologue",
    "deepspeed.runtime.engine:DeepSpeedEngine._get_param_fragment_func",
    "deepspeed.runtime.engine:DeepSpeedEngine.get_global_grad_norm",
    "deepspeed.runtime.engine:DeepSpeedEngine.was_step_applied",
    "deepspeed.runtime.engine:DeepSpeedEngine.zero_optimization_partition_weights",
    "deepspeed.runtime.swap_tensor.partitioned_param_swapper:AsyncPartitionedParameterSwapper",
    "deepspeed.runtime.swap_tensor.partitioned_param_swapper:PartitionedParamStatus",
    "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload.get_param_coordinator",
    "deepspeed.runtime.zero.parameter_offload:print_rank_0",
    "deepspeed.runtime.zero.partition_parameters:Init._convert_to_deepspeed_param",
    "deepspeed.runtime.zero.partition_parameters:InsertPostInitMethodToModuleSubClasses",
    "deepspeed.runtime.zero.partition_parameters:InsertPostInitMethodToModuleSubClasses._set_dtype",
    "deepspeed.runtime.zero.partition_parameters:ZeroParamStatus",
    "deepspeed.runtime.zero.partition_parameters:debug_param2name_id_shape_device",
    "deepspeed.runtime.zero.partition_parameters:print_rank_0",
    "deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator.release_and_reset_all",
    "deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator.reset_step",
    "deepspeed.runtime.zero.partitioned_param_coordinator:print_rank_0",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._get_param_partition_rank",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._loss_scale_update_and_overflow_cleanup",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._optimizer_states_and_gradient_swap_in",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._optimizer_states_and_gradient_swap_out",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._partition_all_parameters",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._pre_step",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._reassign_or_swap_out_partitioned_parameters",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._swappable_optimizer_subgroup",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.checkpoint_event_epilogue",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.checkpoint_event_prologue",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.independent_gradient_partition_epilogue",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.invalidate_secondary_tensor",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.update_lp_params",
    "deepspeed.utils.nvtx:enable_nvtx",
    "deepspeed.utils:groups",
    "deepspeed.utils:set_z3_leaf_module",
    "torch.distributed.distributed_c10d:_world",
    "torch.utils.cpp_extension:_get_build_directory",
)
"""What the room uses that is nobody's promise, as ``module:name``; methods of the engine's objects among them."""


@functools.cache
def load() -> Any:
    """DeepSpeed, with its banners off and without the extension it would compile on a CPU.

    Raises:
        KernelError: It, or torch, is of a version that cannot work, or lacks a name that is needed.
    """
    for library in TESTED:
        check_version(library, importlib.metadata.version(library))
    import deepspeed

    missing = [name for name in PRIVATE_NAMES if not _exists(name)]
    if missing:
        raise KernelError(
            f"deepspeed {deepspeed.__version__} with torch {torch.__version__} has no {', '.join(missing)}",
            rule=f"training was tested with {_tested('deepspeed')} and {_tested('torch')}",
            fix="install one of these versions",
        )
    # deepspeed 0.19.8: build_shm_op() compiles this op on first use and dies without ninja or a compiler.
    private("deepspeed.ops:__compatible_ops__")["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    _quiet_hot_paths()
    return deepspeed


def _quiet_hot_paths() -> None:
    """Spares lines about every parameter that is fetched or released, and ranges for NVIDIA's profiler.

    deepspeed 0.19.8 formats the lines, asks for its rank, and drops them: some 30 us a release of a parameter, and some
    ms for each at start, where a line holds the numbers of all.
    """
    for module in ("parameter_offload", "stage3"):
        # Of both lines, and of nothing else.
        importlib.import_module(f"deepspeed.runtime.zero.{module}").locals = dict  # type: ignore[attr-defined]
    for module in ("parameter_offload", "partition_parameters", "partitioned_param_coordinator"):
        found: Any = importlib.import_module(f"deepspeed.runtime.zero.{module}")
        found.print_rank_0 = _said_only_if_forced(found.print_rank_0)
    partitioning: Any = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    partitioning.debug_param2name_id_shape_device = lambda parameter: parameter.ds_id
    ranges: Any = importlib.import_module("deepspeed.utils.nvtx")
    ranges.enable_nvtx = False


def _said_only_if_forced(print_on_first: Callable[..., None]) -> Callable[..., None]:
    def say(message: object, debug: bool = False, force: bool = False) -> None:
        if debug or force:
            print_on_first(message, debug, force)

    return say


def private(name: str) -> Any:
    """One of ``PRIVATE_NAMES``."""
    assert name in PRIVATE_NAMES, name
    return _resolve(name)


def check_version(library: str, found: str) -> None:
    """Refuses a version older than the oldest tested or with a changed interface; warns of one newer than tested.

    Raises:
        KernelError: It is too old or too new.
    """
    oldest, newest = (_numbers(version) for version in TESTED[library])
    version = _numbers(found)
    rule = f"training was tested with {_tested(library)}"
    if version[: len(oldest)] < oldest or version >= _REFUSED_FROM.get(library, (99,)):
        raise KernelError(f"{library} {found} cannot train", rule=rule, fix=f"install {_tested(library)}")
    if version[: len(newest)] > newest:
        get_logger(__name__).warning("%s %s is newer than any tested: %s", library, found, rule)


def set_group_timeouts(timeout: timedelta) -> None:
    """Lets collectives of every group wait so long; DeepSpeed makes groups of its own, with torch's limits."""
    # Public since torch 2.13 or later; before, under a private name that the newer ones call deprecated.
    groups: Any = dist.distributed_c10d
    set_timeout = getattr(groups, "set_timeout", None) or groups._set_pg_timeout
    for group in groups._world.pg_map:
        set_timeout(timeout, group)


def begin_pass(engine: Engine) -> None:
    """Has ZeRO-3 know that a pass begins: it learns that from the root's ``forward``, and ``predict`` is none.

    Without it (deepspeed 0.19.8) all batches count as one pass, whose recorded order of modules grows without end.
    """
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.parameter_offload.get_param_coordinator().reset_step()


def skip_step(engine: Engine) -> None:
    """Ends a step without ZeRO that is not applied: no gradients are left, and the micro-batch counts."""
    engine.zero_grad()
    engine.micro_steps += 1


def real_shape(parameter: torch.Tensor) -> torch.Size:
    """A parameter's shape in the model: one that ZeRO-3 has cut is empty, and keeps it in ``ds_shape``."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def zero_init(config: dict[str, Any], group: dist.ProcessGroup | None = None) -> Any:
    """ZeRO-3's converter of parameters, of an empty module: has read the config, and has nothing to convert.

    Args:
        config: DeepSpeed's config dict.
        group: Process group of the ranks among which it cuts; ``None`` for all.
    """
    return load().zero.Init(module=nn.Module(), config_dict_or_path=config, data_parallel_group=group)


def _exists(name: str) -> bool:
    try:
        _resolve(name)
    except (ImportError, AttributeError):
        return False
    return True


def _resolve(name: str) -> Any:
    module, _, path = name.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _tested(library: str) -> str:
    oldest, newest = TESTED[library]
    return f"{library} {oldest}" + (f" to {newest}" if newest != oldest else "")
