"""Precision and recall by the least score that counts, from what scoring gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from piip_scale.tasks.detection.scoring import Scores

Floats = npt.NDArray[np.float64]

ALL_CLASSES = ""
"""The curve of means over classes."""
MOST_CLASSES = 8
"""Classes that have a curve of their own: a set of hundreds would fill a run's directory."""
_NUM_THRESHOLDS = 101


def pr_curves(scores: Scores, num_objects: Mapping[int, int], names: Mapping[int, str]) -> dict[str, Floats]:
    """Curves of all classes together and of those with the most objects, at an IoU of 0.5.

    Precision is interpolated, as COCO has it: at each recall the best at that or more; so is what follows from it, the
    number of wrong detections. Together are means over the classes that have objects.

    Args:
        scores: With ``score_RK``.
        num_objects: By category id.
        names: Likewise.

    Returns:
        By name, float64 (5, 101) of scores 0, 0.01 to 1: right and wrong detections, objects missed, precision and
        recall. Nothing where no class has objects, or scores are not known.
    """
    if scores.score_RK is None:
        return {}
    places = {number: k for k, number in enumerate(sorted(names)) if num_objects.get(number, 0)}
    of_class = {number: _curve(scores, k, num_objects[number]) for number, k in places.items()}
    if not of_class:
        return {}
    every = np.stack(list(of_class.values()))
    mean = np.concatenate([every[:, :3].sum(0), every[:, 3:].mean(0)])
    chosen = sorted(sorted(of_class, key=lambda number: -num_objects[number])[:MOST_CLASSES])
    return {ALL_CLASSES: mean} | {names[number]: of_class[number] for number in chosen}


def _curve(scores: Scores, k: int, num_objects: int) -> Floats:
    assert scores.score_RK is not None
    precision_R, score_R = scores.precision_RK[:, k], scores.score_RK[:, k]
    thresholds = np.linspace(0.0, 1.0, _NUM_THRESHOLDS)
    # A recall that no detection reaches has a precision of 0; the first is reached by any that is right.
    reached = np.array([_last(np.flatnonzero((precision_R > 0) & (score_R >= least))) for least in thresholds])
    recall = np.linspace(0.0, 1.0, len(precision_R))[reached]
    precision = precision_R[reached]
    right = np.rint(recall * num_objects)
    wrong = np.where(precision > 0, np.rint(right / np.maximum(precision, np.finfo(np.float64).eps)) - right, 0.0)
    return np.stack([right, wrong, num_objects - right, precision, recall])


def _last(places: Sequence[int] | npt.NDArray[np.int64]) -> int:
    return int(places[-1]) if len(places) else 0
