"""Turns pydantic's report into one line: the key, the value, the rule, the nearest valid keys."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from piip_scale.errors import ConfigError


def explain(error: ValidationError, root: type[BaseModel], noun: str = "config key") -> ConfigError:
    """The first problem of a validation as a ``ConfigError``; later ones are counted.

    Args:
        error: What pydantic found.
        root: The model that was validated.
        noun: What its keys are called.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    location, kind = first["loc"], first["type"]
    key = _key(location, root)
    others = {_key(problem["loc"], root) for problem in problems} - {key}
    more = f"(and {len(others)} more)" if others else ""
    if kind == "extra_forbidden":
        return ConfigError(f"unknown {noun} {key}", value=first["input"], rule=_valid_keys(location, root), fix=more)
    if kind == "missing":
        return ConfigError(f"{noun} {key} is missing", rule=_purpose(location, root), fix=more)
    # A rule over several keys of one object: the values stand in its message, the object itself would flood the line.
    # A value that fits no member of a union has one message for each.
    messages = [_lowered(problem["msg"]) for problem in problems if _key(problem["loc"], root) == key]
    value = None if isinstance(first["input"], dict | tuple | BaseModel) and kind == "value_error" else first["input"]
    return ConfigError(f"{noun} {key}", value=_short(value), rule=" or ".join(messages), fix=more)


def _key(location: Sequence[int | str], root: type[BaseModel]) -> str:
    return ".".join(_written(location, root)) or "config"


def _lowered(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _valid_keys(location: Sequence[int | str], root: type[BaseModel]) -> str:
    model, name = _model_at(location[:-1], root), str(location[-1])
    if model is None:
        return ""
    near = difflib.get_close_matches(name, model.model_fields, n=3, cutoff=0.5)
    listing = ", ".join(model.model_fields)
    return f"did you mean {' or '.join(near)}? valid keys: {listing}" if near else f"valid keys: {listing}"


def _purpose(location: Sequence[int | str], root: type[BaseModel]) -> str:
    model = _model_at(location[:-1], root)
    return "" if model is None else f"{model.__name__} needs {', '.join(_required(model))}"


def _required(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if field.is_required()]


def _model_at(location: Sequence[int | str], root: type[BaseModel]) -> type[BaseModel] | None:
    """The model that holds the keys at a location, following fields, list entries and tags of unions."""
    candidates: list[type[BaseModel]] = [root]
    for part in location:
        if isinstance(part, int):
            continue
        fields = [model.model_fields[part] for model in candidates if part in model.model_fields]
        if fields:
            candidates = [model for field in fields for model in _models_in(field.annotation)]
        else:
            candidates = [
                m for m in candidates if m.model_fields.get("kind") and m.model_fields["kind"].default == part
            ]
    return candidates[0] if candidates else None


def _written(location: Sequence[int | str], root: type[BaseModel]) -> list[str]:
    """A location as it stands in the file: without what pydantic adds to say which member of a union it tried."""
    return [
        str(part)
        for index, part in enumerate(location)
        if index == 0 or isinstance(part, int) or not _is_member(location[:index], part, root)
    ]


def _is_member(parents: Sequence[int | str], part: str, root: type[BaseModel]) -> bool:
    if _model_at(parents, root) is None:
        # Below a plain value nothing has a name but a member of its type.
        return True
    model = _model_at([*parents, part], root)
    return isinstance(parents[-1], int) and model is not None and model.model_fields["kind"].default == part


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _short(value: object, limit: int = 80) -> object:
    if value is None or len(repr(value)) <= limit:
        return value
    return repr(value)[: limit - 3] + "..."
