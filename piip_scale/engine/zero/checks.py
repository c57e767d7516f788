"""What a plan of sharding needs of DeepSpeed and of the machine, checked before any rank works on it."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from piip_scale.config.run import RunConfig
from piip_scale.engine.zero.deepspeed_api import private
from piip_scale.engine.zero.extensions import missing_tools
from piip_scale.engine.zero.plan import Sharding, Sizes, measure, plan_sharding
from piip_scale.errors import ConfigError, KernelError
from piip_scale.tasks.base import TrainableModel
from piip_scale.world import World

if TYPE_CHECKING:
    from pydantic import ValidationError

_MAX_SUGGESTIONS = 3


def checked_plan(model: nn.Module, config: RunConfig, world: World) -> tuple[Sizes, Sharding]:
    """Plans the sharding, and refuses what DeepSpeed would refuse late, in many lines, or not at all.

    Args:
        model: A ``TrainableModel``, on any device.
        config: The run.
        world: The ranks.

    Returns:
        The model's sizes, and the plan for them.

    Raises:
        ConfigError: A raw key that contradicts one of ours, that DeepSpeed does not know or whose value it refuses, a
            part of a node that does not divide it, or a folder that cannot take files.
        KernelError: DeepSpeed's disk I/O cannot be had here.
        ModelError: The model names no parts.
    """
    sizes = measure(model, cast(TrainableModel, model).parts())
    plan = plan_sharding(config, sizes, world.num_ranks)
    _check_node_partition(config.zero.node_partition, world)
    for name in ("offload_optimizer", "offload_parameters"):
        place = getattr(config.zero, name)
        if place not in ("none", "cpu"):
            _check_disk(name, Path(place))
    if config.zero.deepspeed:
        _check_keys(config.zero.deepspeed, plan.deepspeed)
    return sizes, plan


def _check_node_partition(size: int, world: World) -> None:
    if world.ranks_per_node % size or world.num_ranks % size:
        raise ConfigError(
            "zero.node_partition",
            value=size,
            rule=f"it divides the {world.ranks_per_node} ranks of each node",
            fix=f"take {world.ranks_per_node}, or 1 for none",
        )


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


def _check_keys(raw: Mapping[str, Any], merged: Mapping[str, Any]) -> None:
    """DeepSpeed passes over top-level keys it does not know; so its own parser is watched for what it asks."""
    from deepspeed.runtime import config as parsing
    from pydantic import ValidationError

    asked = _Asked(copy.deepcopy(merged))
    try:
        parsing.DeepSpeedConfig(asked)
    except ValidationError as error:
        raise _invalid(error, raw) from None
    except (parsing.DeepSpeedConfigError, AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"DeepSpeed refuses zero.deepspeed: {error}", value=dict(raw)) from None
    # The parser also asks for keys of earlier versions, to refuse them.
    _check_asked(raw, asked, "", getattr(parsing, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}).keys())


class _Asked(dict[str, Any]):
    """A dict, and those in it, that notes the keys its reader asks for; who reads all of it has asked for all."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        nested = {key: _Asked(value) if isinstance(value, Mapping) else value for key, value in values.items()}
        super().__init__(nested)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        self.asked |= set(super().__iter__())
        return super().__iter__()

    def __copy__(self) -> _Asked:
        return self

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def items(self) -> Any:
        self.asked |= set(super().__iter__())
        return super().items()


def _check_asked(raw: Mapping[str, Any], seen: Mapping[str, Any], prefix: str, removed: Iterable[str]) -> None:
    assert isinstance(seen, _Asked)
    for key, value in raw.items():
        if key not in seen.asked:
            raise _unknown(f"{prefix}{key}", value, seen.asked - set(removed))
        inner = dict.get(seen, key)
        if isinstance(value, Mapping) and isinstance(inner, _Asked):
            _check_asked(value, inner, f"{prefix}{key}.", ())


def _unknown(path: str, value: object, valid: Iterable[str]) -> ConfigError:
    listing = sorted(valid)
    near = difflib.get_close_matches(path.rpartition(".")[2], listing, n=_MAX_SUGGESTIONS, cutoff=0.5)
    return ConfigError(
        f"unknown key zero.deepspeed.{path}",
        value=value,
        rule=f"did you mean {' or '.join(near)}?" if near else f"DeepSpeed has {', '.join(listing)}",
        fix="correct the key or leave it out",
    )


def _invalid(error: ValidationError, raw: Mapping[str, Any]) -> ConfigError:
    """The first thing that one of DeepSpeed's pydantic models refuses; it knows no more than the end of the path."""
    first = error.errors(include_url=False)[0]
    end = ".".join(str(part) for part in first["loc"])
    path = next((key for key in _paths(raw) if f".{key}".endswith(f".{end}")), end)
    if first["type"] == "extra_forbidden":
        return _unknown(path, first["input"], _fields(error.title, first["loc"]))
    return ConfigError(
        f"DeepSpeed refuses zero.deepspeed.{path}",
        value=first["input"],
        rule=str(first["msg"]),
        fix="correct the value or leave it out",
    )


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _fields(title: str, location: tuple[int | str, ...]) -> set[str]:
    """Names and aliases of the fields of DeepSpeed's model ``title``, or of the one inside it that was refused."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    models = {model.__name__: model for model in _subclasses(DeepSpeedConfigModel)}
    model = models[title]
    for part in location[:-1]:
        annotation = str(model.model_fields[str(part)].annotation)
        model = next((found for name, found in models.items() if name in annotation), model)
    return {name for key, field in model.model_fields.items() for name in (key, field.alias) if name}


def _subclasses(model: type[Any]) -> Iterator[type[Any]]:
    for subclass in model.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
