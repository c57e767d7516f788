"""What each metric of an evaluation means, for people."""

from __future__ import annotations

import re

# By name: what it is called in little room, and what it means.
_WORDS = {
    r"ap": ("AP", "average precision, mean over IoU of 0.50 to 0.95"),
    r"ap50": ("AP50", "average precision at an IoU of 0.5"),
    r"ap75": ("AP75", "average precision at an IoU of 0.75"),
    r"ap50_11_points": ("AP50, 11 points", "the same at 11 points of recall, as until VOC2009"),
    r"ap_s": ("AP small", "average precision of objects below 32 x 32 px"),
    r"ap_m": ("AP medium", "average precision of objects of 32 x 32 to 96 x 96 px"),
    r"ap_l": ("AP large", "average precision of objects above 96 x 96 px"),
    r"ap_(rare|common|frequent)": (r"AP \1", r"average precision of classes that are \1 in training"),
    r"ar(\d+)": (r"AR\1", r"average recall with at most \1 detections an image"),
    r"ar_s": ("AR small", "average recall of objects below 32 x 32 px"),
    r"ar_m": ("AR medium", "average recall of objects of 32 x 32 to 96 x 96 px"),
    r"ar_l": ("AR large", "average recall of objects above 96 x 96 px"),
    r"miou": ("mean IoU", "mean over classes of intersection over union of their pixels"),
    r"macc": ("mean accuracy", "mean over classes of the share of their pixels that is found"),
    r"aacc": ("pixel accuracy", "share of all pixels with the right class"),
    r"iou": ("IoU", "intersection over union of a class's pixels"),
    r"top1_accuracy": ("top-1 accuracy", "share of images whose first guess is right"),
    r"top5_accuracy": ("top-5 accuracy", "share of images whose class is among the first five guesses"),
}
KINDS_OF_SHAPES = ("box", "mask")
"""What a measure of objects is of."""


def kind_of(metric: str) -> str:
    """The kind of shape that a metric is of; empty where it is of none.

    Args:
        metric: As ``Metric.compute`` names it.
    """
    kind = metric.partition("_")[0]
    return kind if kind in KINDS_OF_SHAPES else ""


def measure_of(metric: str) -> str:
    """A metric's name without the kind of shape that it is of.

    Args:
        metric: As ``Metric.compute`` names it.
    """
    return metric.removeprefix(f"{kind_of(metric)}_") if kind_of(metric) else metric


def title_of(metric: str) -> str:
    """What a metric is called in little room; its own name where it is not known.

    Args:
        metric: As ``Metric.compute`` names it, with the kind of shape or without.
    """
    title = _told(measure_of(metric), 0) or measure_of(metric)
    return " ".join(filter(None, (kind_of(metric), title)))


def words_of(measure: str) -> str:
    """A measure's meaning by its name; empty for one that is not known."""
    return _told(measure, 1)


def _told(measure: str, which: int) -> str:
    for pattern, words in _WORDS.items():
        if match := re.fullmatch(pattern, measure):
            return match.expand(words[which])
    return ""
