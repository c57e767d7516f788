"""Sweeps: one submission, several runs, each with settings of its own. Pure functions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from piip_scale.errors import ConfigError

MAX_RUNS = 1000
_MAX_NAME = 100
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        index: Its task in the job array.
        overrides: ``key.path=value`` for each axis.
        name: Folder of its run, inside the sweep's.
    """

    index: int
    overrides: tuple[str, ...]
    name: str


def sweep_points(axes: Sequence[str]) -> list[Point]:
    """Every combination of the axes' values, the last axis changing fastest.

    Args:
        axes: ``key.path=value,value,...``; a comma inside brackets or quotes belongs to its value.

    Raises:
        ConfigError: An axis that reads otherwise, twice the same key, or too many runs.
    """
    read = [_read_axis(axis) for axis in axes]
    keys = [key for key, _ in read]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError("--sweep", value=key, rule="each key once", fix="give all its values together: key=1,2,3")
    number = 1
    for _, values in read:
        number *= len(values)
    if number > MAX_RUNS:
        raise ConfigError("--sweep", value=f"{number} runs", rule=f"at most {MAX_RUNS} in one submission")
    combinations = itertools.product(*(values for _, values in read))
    return [_point(index, keys, values, len(str(number - 1))) for index, values in enumerate(combinations)]


def choose_points(points: Sequence[Point], array: str) -> tuple[list[Point], str]:
    """Those that an array text such as ``0-3,7%2`` names, and its limit on tasks that run at once (``%2``).

    Raises:
        ConfigError: The text reads otherwise, or names none or points that are not there.
    """
    text, sign, limit = array.partition("%")
    rule = "indices of the sweep's runs, as in 0-3,7; %N after them lets N run at once"
    wanted: set[int] = set()
    for part in text.split(",") if text else ():
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ConfigError("--array", value=array, rule=rule)
        wanted |= set(range(int(match[1]), min(int(match[2] or match[1]), len(points)) + 1))
    if sign and not (limit.isdecimal() and int(limit)):
        raise ConfigError("--array", value=array, rule=rule)
    if not text:
        wanted = set(range(len(points)))
    if not wanted or max(wanted) >= len(points):
        raise ConfigError("--array", value=array, rule=f"the sweep has runs 0 to {len(points) - 1}")
    return [point for point in points if point.index in wanted], sign + limit


def _read_axis(text: str) -> tuple[str, list[str]]:
    key, sign, values = text.partition("=")
    found = split_values(values)
    if not sign or not key.strip() or not all(found):
        raise ConfigError(
            "--sweep", value=text, rule="it reads key.path=value,value,...", fix="for example optimizer.lr=1e-4,2e-4"
        )
    return key.strip(), found


def split_values(text: str) -> list[str]:
    """Values between the commas that stand outside of brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            values.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        values[-1] += letter
    return [value.strip() for value in values]


def _point(index: int, keys: Sequence[str], values: Sequence[str], digits: int) -> Point:
    overrides = tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True))
    settings = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in zip(keys, values, strict=True))
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "_", settings).strip("_")
    return Point(index, overrides, f"{index:0{digits}d}-{safe}"[:_MAX_NAME])
