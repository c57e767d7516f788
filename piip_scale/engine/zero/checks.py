"""What a plan of sharding needs of DeepSpeed and of the machine, checked before any rank works on it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from torch import nn

from piip_scale.config.run import RunConfig
from piip_scale.engine.zero.deepspeed_api import private
from piip_scale.engine.zero.extensions import missing_tools
from piip_scale.engine.zero.plan import Sharding, Sizes, measure, plan_sharding
from piip_scale.errors import ConfigError, KernelError
from piip_scale.tasks.base import TrainableModel
from piip_scale.world import World


def checked_plan(model: nn.Module, config: RunConfig, world: World) -> tuple[Sizes, Sharding]:
    """Plans the sharding, and refuses what DeepSpeed would refuse late, in many lines, or not at all.

    Args:
        model: A ``TrainableModel``, on any device.
        config: The run.
        world: The ranks.

    Returns:
        The model's sizes, and the plan for them.

    Raises:
        ConfigError: A raw key that is not allowed, or that DeepSpeed refuses beside the others, a part of a node that
            does not divide it, or a folder that cannot take files.
        KernelError: DeepSpeed's disk I/O cannot be had here.
        ModelError: The model names no parts.
    """
    sizes = measure(model, cast(TrainableModel, model).parts())
    plan = plan_sharding(config, sizes, world.num_ranks, world.ranks_per_node)
    for name in ("offload_optimizer", "offload_parameters"):
        place = getattr(config.zero, name)
        if place not in ("none", "cpu"):
            _check_disk(name, Path(place))
    if config.zero.deepspeed:
        _check_parses(plan.deepspeed, config.zero.deepspeed)
    return sizes, plan


def _check_disk(name: str, folder: Path) -> None:
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ConfigError(f"zero.{name}", value=str(folder), rule="it is a folder that exists and can be written")
    missing = missing_tools()
    if not private("deepspeed.ops.op_builder:AsyncIOBuilder")().is_compatible():
        missing.insert(0, "libaio")
    if missing:
        raise KernelError(
            f"zero.{name}={str(folder)!r} needs DeepSpeed's disk I/O, which cannot be built here",
            value=f"no {' and no '.join(missing)}",
            rule="it is compiled at its first use from libaio (libaio-dev), a C++ compiler and ninja",
            fix=f"install them, or set zero.{name}='cpu'",
        )


def _check_parses(config: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """DeepSpeed's own parser looks at the whole once, before ranks start: keys can contradict each other."""
    refusals = (private("deepspeed.runtime.config:DeepSpeedConfigError"), ValidationError, AssertionError)
    try:
        private("deepspeed.runtime.config:DeepSpeedConfig")(copy.deepcopy(dict(config)))
    except (*refusals, TypeError, ValueError) as error:
        raise ConfigError(f"DeepSpeed refuses zero.deepspeed: {error}", value=dict(raw)) from None
