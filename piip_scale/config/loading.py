"""From a config file to a checked ``RunConfig``, and back to a file.

Config files are Python files as mmdet's users know them, read by mmengine's own ``Config``: ``_base_`` names files
to inherit from, nested dicts merge, ``_delete_=True`` replaces. Lists do not merge: a base that leaves some keys of its
branches to others writes ``model.branches`` as a dict of named branches, in the order of the list that it becomes.
"""

from __future__ import annotations

import ast
import copy
import pprint
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from piip_scale.config.explain import explain
from piip_scale.config.run import RunConfig
from piip_scale.errors import ConfigError
from piip_scale.registry import config_class


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads, overrides and checks a config file.

    Args:
        path: A Python config file.
        overrides: ``key.path=value`` texts; values are Python literals, anything else is taken as text.
            A number in the path indexes a list, ``*`` takes all of one: ``model.branches.*.checkpoint_blocks=True``.

    Raises:
        ConfigError: The file cannot be read, or its content cannot be meant; names key, value and rule.
    """
    return config_from(_read(Path(path)), overrides)


def config_from(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The same of plain values.

    Raises:
        ConfigError: As of ``load_config``.
    """
    changed = copy.deepcopy(dict(values))
    for override in overrides:
        key, value = _parse_override(override)
        for path in list(_paths(changed, key)):
            _assign(changed, path, value)
    return check_config(changed)


def check_config(values: Mapping[str, Any]) -> RunConfig:
    """Validates plain values into the ``RunConfig`` of their task.

    Raises:
        ConfigError: Naming the first offending key, its value, the rule and the nearest valid keys.
    """
    run_class: type[RunConfig] = config_class(values)
    try:
        return run_class.model_validate(_tuples(values))
    except ValidationError as error:
        raise explain(error, run_class) from None


def config_text(config: RunConfig) -> str:
    """The config as a Python config file that loads to an equal config; what is left to a plan is left out."""
    values = config.model_dump(mode="python")
    for key in config.zero.open_keys:
        del values["zero"][key]
    lines = [f"{key} = {pprint.pformat(_lists(value), width=110, sort_dicts=False)}" for key, value in values.items()]
    return "# Resolved: every key of the run, presets and bases expanded.\n" + "\n".join(lines) + "\n"


def changed_keys(overrides: Sequence[str]) -> dict[str, Any]:
    """What overrides change, by key, the last of a key.

    Raises:
        ConfigError: One that does not read ``key.path=value``.
    """
    return {".".join(key): value for key, value in map(_parse_override, overrides)}


def _read(path: Path) -> dict[str, Any]:
    from mmengine.config import Config  # costs 0.3 s, which --help need not pay

    if not path.is_file():
        raise ConfigError("config file not found", value=str(path), fix="configs/ holds the ones that ship")
    if path.suffix != ".py":
        raise ConfigError("config file", value=str(path), rule="it must be a Python file (.py)")
    try:
        loaded = Config.fromfile(str(path), lazy_import=False)
    except Exception as error:  # the file is code and may raise anything
        raise ConfigError(f"config file {path} fails to load: {type(error).__name__}: {error}") from error
    values = loaded.to_dict()
    _list_branches(values.get("model"))
    return {key: value for key, value in values.items() if key not in ("default_scope",)}


def _list_branches(model: Any) -> None:
    if isinstance(model, dict) and isinstance(model.get("branches"), dict):
        model["branches"] = list(model["branches"].values())


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError("override", value=text, rule="it must read key.path=value", fix="for example train.steps=100")
    try:
        return key.strip().split("."), ast.literal_eval(value)
    # Text such as {[]: 1} or ten thousand brackets is no value either.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return key.strip().split("."), value


def _paths(values: dict[str, Any], path: list[str]) -> Iterator[list[str]]:
    """The path with each ``*`` in it as the number of every entry of a list."""
    if _EVERY not in path:
        yield path
        return
    at = path.index(_EVERY)
    target: Any = values
    for depth, key in enumerate(path[:at]):
        target = _child(target, key, ".".join(path[: depth + 1]))
    if not isinstance(target, list | tuple):
        raise ConfigError(f"override {'.'.join(path)}", value=_EVERY, rule="it stands for every entry of a list")
    for index in range(len(target)):
        yield from _paths(values, [*path[:at], str(index), *path[at + 1 :]])


def _assign(values: dict[str, Any], path: list[str], value: Any) -> None:
    target: Any = values
    for depth, key in enumerate(path[:-1]):
        target = _child(target, key, ".".join(path[: depth + 1]))
    last = path[-1]
    if isinstance(target, list):
        target[_index(target, last, ".".join(path))] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise ConfigError(f"override {'.'.join(path)}", value=target, rule="the key before the last must hold a dict")


def _child(target: Any, key: str, path: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, key, path)]
    if isinstance(target, dict):
        return target.setdefault(key, {})
    raise ConfigError(f"override {path}", value=target, rule="the keys before it must hold dicts or lists")


def _index(target: list[Any], key: str, path: str) -> int:
    if key.isdecimal() and int(key) < len(target):
        return int(key)
    raise ConfigError(f"override {path}", value=key, rule=f"the list has entries 0 to {len(target) - 1}")


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        # mmdet's own overrides are handed on as they are, so lists in them stay lists.
        return {key: _lists(item) if key in _FOREIGN else _tuples(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    return value


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_lists(item) for item in value]
    return value


_FOREIGN = ("overrides", "deepspeed")
_EVERY = "*"
