"""Nodes that failed, with the reason: ``job/bad_nodes.json``, for people and for the next attempt."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from piip_scale.errors import RunError
from piip_scale.files import disk_errors, write_text_atomically

# Somebody repairs them, and a job may run for weeks.
_FORGET_AFTER_S = 24 * 3600.0


@dataclass(frozen=True)
class BadNode:
    """Why a node is not to be used.

    Attributes:
        reason: One line.
        unix_time_s: When it was last seen.
    """

    reason: str
    unix_time_s: float


def read_bad_nodes(path: Path, now_unix_s: float) -> dict[str, BadNode]:
    """Those of the last day, by name; none where the file is absent or no such file."""
    found = {}
    with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        for node, values in json.loads(path.read_text(encoding="utf-8")).items():
            bad = BadNode(**values)
            if now_unix_s - bad.unix_time_s < _FORGET_AFTER_S:
                found[node] = bad
    return found


def add_bad_nodes(path: Path, reasons: Mapping[str, str], now_unix_s: float) -> None:
    """Adds nodes, each with its reason.

    Raises:
        RunError: The disk refuses.
    """
    if not reasons:
        return
    known = read_bad_nodes(path, now_unix_s) | {node: BadNode(reason, now_unix_s) for node, reason in reasons.items()}
    with disk_errors(RunError, f"write {path}"):
        write_text_atomically(path, json.dumps({node: asdict(bad) for node, bad in known.items()}, indent=1) + "\n")


def choose_nodes(healthy: Sequence[str], num_nodes: int, last: Collection[str]) -> tuple[str, ...]:
    """The nodes to train on, in their order.

    Args:
        healthy: Those that can.
        num_nodes: So many, or as many as there are.
        last: Those to take only where there are no others.
    """
    ranked = sorted(healthy, key=lambda node: node in last)
    chosen = set(ranked[:num_nodes])
    return tuple(node for node in healthy if node in chosen)
