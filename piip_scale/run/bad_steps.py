"""Steps that were not applied, each as a file of the run: which samples, which losses, and the way back to it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from piip_scale.errors import RunError
from piip_scale.files import disk_errors
from piip_scale.run.run_dir import RunDirectory, write_text_atomic

MOST_FILES = 50
"""The files of older steps go: a run that skips often says so by its newest as well."""

_NAME = re.compile(r"step_(\d+)\.json")


@dataclass(frozen=True)
class RankOfBadStep:
    """One rank's part of a step that was not applied.

    Attributes:
        losses: Named losses, means over its micro-batches.
        max_loss: The largest loss that it would have taken.
        keys: Of the samples that it asked for, by micro-batch.
    """

    losses: dict[str, float]
    max_loss: float
    keys: list[list[str]]


@dataclass(frozen=True)
class BadStep:
    """A step that was not applied.

    Attributes:
        step: Steps behind the run with this one.
        reason: Why not, in words.
        grad_norm: Of the whole gradient, where anybody knows it.
        ranks: In their order.
        checkpoint_step: Of the newest checkpoint at that time; ``None`` for none.
        config_sha256: Of the run's config file at that time.
    """

    step: int
    reason: str
    grad_norm: float
    ranks: list[RankOfBadStep]
    checkpoint_step: int | None
    config_sha256: str


def config_sha256(run: RunDirectory) -> str:
    """SHA-256 of the config file that the run last went on with, as ``sha256sum`` prints it.

    Raises:
        RunError: It cannot be read.
    """
    with disk_errors(RunError, f"read {run.newest_config}"):
        return hashlib.sha256(run.newest_config.read_bytes()).hexdigest()


def write_bad_step(run: RunDirectory, bad: BadStep) -> Path:
    """Writes a step's file and removes those of the oldest beyond ``MOST_FILES``; returns its path. Main rank only.

    Raises:
        RunError: The disk refuses.
    """
    path = _path(run, bad.step)
    write_text_atomic(path, json.dumps(_plain(asdict(bad)), indent=1, allow_nan=False) + "\n")
    for step in bad_steps(run)[:-MOST_FILES]:
        with disk_errors(RunError, f"remove {_path(run, step)}"), suppress(FileNotFoundError):
            _path(run, step).unlink()
    return path


def bad_steps(run: RunDirectory) -> list[int]:
    """The steps that there are files of, in rising order."""
    if not run.bad_steps.is_dir():
        return []
    with disk_errors(RunError, f"read {run.bad_steps}"):
        matches = [_NAME.fullmatch(path.name) for path in run.bad_steps.iterdir()]
    return sorted(int(match[1]) for match in matches if match)


def read_bad_step(run: RunDirectory, step: int) -> BadStep | None:
    """A step's file; ``None`` where there is none.

    Raises:
        RunError: It cannot be read.
    """
    path = _path(run, step)
    try:
        with disk_errors(RunError, f"read {path}"):
            content = json.loads(path.read_text(encoding="utf-8"))
        ranks = [_rank_of(**rank) for rank in content["ranks"]]
        return BadStep(**content | {"ranks": ranks, "grad_norm": float(content["grad_norm"])})
    except RunError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{path} cannot be read: {type(error).__name__}: {error}", fix="move it away, and replay goes without it"
        ) from error


def _rank_of(losses: Mapping[str, Any], max_loss: Any, keys: list[list[str]]) -> RankOfBadStep:
    return RankOfBadStep({name: float(value) for name, value in losses.items()}, float(max_loss), keys)


def _path(run: RunDirectory, step: int) -> Path:
    return run.bad_steps / f"step_{step:08d}.json"


def _plain(value: Any) -> Any:
    """As in ``metrics.jsonl``: bare NaN is not JSON."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
