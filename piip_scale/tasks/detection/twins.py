"""Which of mmdet's parts are built as ours: the same results with fewer waits for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from piip_scale.tasks.detection import few_waits, few_waits_dino

_TWINS = few_waits.TWINS | few_waits_dino.TWINS


def with_few_waits(model: Any) -> Any:
    """A model's config in which every part that has a twin is built as that."""
    if isinstance(model, Mapping):
        changed = {key: with_few_waits(value) for key, value in model.items()}
        return changed | ({"type": _TWINS[model["type"]]} if model.get("type") in _TWINS else {})
    return [with_few_waits(value) for value in model] if isinstance(model, list | tuple) else model
