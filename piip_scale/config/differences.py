"""In which keys configs differ, by their resolved files; these are values, and read as such, never run."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def resolved_keys(path: Path) -> dict[str, str]:
    """Every key of a resolved config by its whole name, as ``model.branches.0.depth``, with its value as text.

    Lines that are no values are left out; so is everything of a file that is no Python.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                value = ast.literal_eval(node.value)
            except (ValueError, TypeError, RecursionError, MemoryError):
                continue
            _flatten(node.targets[0].id, value, found)
    return found


def differing_keys(configs: Sequence[Mapping[str, str]]) -> dict[str, list[str | None]]:
    """Keys whose values are not the same in all configs, with each one's value; ``None`` where it has no such key."""
    names = dict.fromkeys(name for config in configs for name in config)
    rows = {name: [config.get(name) for config in configs] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _flatten(name: str, value: Any, found: dict[str, str]) -> None:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _flatten(f"{name}.{key}", inner, found)
    elif isinstance(value, list | tuple) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            _flatten(f"{name}.{number}", inner, found)
    else:
        found[name] = repr(value)
