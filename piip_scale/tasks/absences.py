"""Which metrics cannot be computed, for the log: COCO's -1 and a mean over nothing are no scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_PER_CLASS = "per_class/"
_MOST_NAMED = 8


def absences(metrics: Mapping[str, float]) -> list[str]:
    """A line for each kind of metric that stands for no objects or pixels in the set; none where all are scores.

    Args:
        metrics: A metric's ``compute``: -1 or NaN where there was nothing to compute of.
    """
    absent = [name for name, value in metrics.items() if value == -1 or math.isnan(value)]
    wholes = [name for name in absent if not name.startswith(_PER_CLASS)]
    classes = list(dict.fromkeys(name.split("/", 2)[2] for name in absent if name.startswith(_PER_CLASS)))
    lines = []
    if wholes:
        lines.append(f"{_some(wholes)}: -1 or nan is no score: the set holds nothing of that size, or nothing at all")
    if classes:
        lines.append(f"{len(classes)} class(es) without objects in this set, left out of the means: {_some(classes)}")
    return lines


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
