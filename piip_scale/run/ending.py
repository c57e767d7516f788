"""How a training ended: one record, made by whoever ended it and embedded as it is in every file that reports it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

from piip_scale.errors import HangError, PiipError
from piip_scale.run.reasons import reason_of
from piip_scale.world import node_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Record = TypeVar("_Record", bound="DataclassInstance")
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "int | None": (int, NoneType),
    "float | None": (int, float, NoneType),
}


@dataclass(frozen=True)
class Ending:
    """How an attempt at a training ended: ``errors/first.json``, part of ``status.json`` and of ``attempts.jsonl``.

    Attributes:
        reason: What kind of failure, as ``reason_of`` names it: ``hang``, ``lost rank``, ``exception`` ...; empty
            where it did not fail.
        line: The failure, or what was done, in one line.
        cause: Why the ranks were asked to stop: ``time limit``, ``preemption``, ``requeue``, ``user``, ``cancel``;
            empty where they were not, and in what a rank writes, which does not know it.
        step: Optimiser steps behind the rank.
        rank: The rank that failed first; ``None`` where it is not known.
        node: Its node.
        exit_code: What its process exits with.
        unix_time_s: When.
        late_rank: The rank that it waited for in vain, where that is what happened.
    """

    reason: str = ""
    line: str = ""
    cause: str = ""
    step: int = 0
    rank: int | None = None
    node: str = ""
    exit_code: int = 0
    unix_time_s: float = 0.0
    late_rank: int | None = None

    def failed(self, reason: str, line: str, **more: Any) -> Ending:
        """The same with what went wrong."""
        return replace(self, reason=reason, line=line, **more)


def ending_of(error: BaseException, rank: int | None = None, step: int = 0, node: str = "") -> Ending:
    """What an error that a rank met comes to.

    Args:
        error: The error.
        rank: Whose it is.
        step: Optimiser steps behind the rank.
        node: Where the rank ran; this machine where empty.
    """
    return Ending(
        reason=reason_of(error),
        line=error_line(error),
        step=step,
        rank=rank,
        node=node or node_name(),
        exit_code=error.exit_code if isinstance(error, PiipError) else 1,
        unix_time_s=time.time(),
        late_rank=error.late_ranks[0] if isinstance(error, HangError) and error.late_ranks else None,
    )


def parse_ending(values: Mapping[str, Any]) -> Ending:
    """An ending from a file; keys of other versions are passed over.

    Raises:
        TypeError: The values are no mapping, or one of them is none that its key can have.
        AttributeError: The values are no mapping.
    """
    known = {field.name for field in fields(Ending)}
    return checked(Ending(**{key: value for key, value in values.items() if key in known}))


def checked(record: _Record) -> _Record:
    """A record of plain values from a file that somebody may have edited; values of types not named here pass.

    Raises:
        TypeError: A value has not the type of its field.
    """
    for field in fields(record):
        types, value = _TYPES.get(str(field.type)), getattr(record, field.name)
        if types is not None and (not isinstance(value, types) or isinstance(value, bool)):
            raise TypeError(f"{field.name} cannot be {value!r}")
    return record


def error_line(error: BaseException) -> str:
    """Any error in one line: ours as it is, another with its type."""
    return error.line if isinstance(error, PiipError) else " ".join(f"{type(error).__name__}: {error}".split())
