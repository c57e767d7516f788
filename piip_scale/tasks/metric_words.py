"""What each metric of an evaluation means, for people."""

from __future__ import annotations

import re

_WORDS = {
    r"ap": "average precision, mean over IoU of 0.50 to 0.95",
    r"ap50": "average precision at an IoU of 0.5",
    r"ap75": "average precision at an IoU of 0.75",
    r"ap50_11_points": "the same at 11 points of recall, as until VOC2009",
    r"ap_s": "average precision of objects below 32 x 32 px",
    r"ap_m": "average precision of objects of 32 x 32 to 96 x 96 px",
    r"ap_l": "average precision of objects above 96 x 96 px",
    r"ap_(rare|common|frequent)": r"average precision of classes that are \1 in training",
    r"ar(\d+)": r"average recall with at most \1 detections an image",
    r"ar_s": "average recall of objects below 32 x 32 px",
    r"ar_m": "average recall of objects of 32 x 32 to 96 x 96 px",
    r"ar_l": "average recall of objects above 96 x 96 px",
    r"miou": "mean over classes of intersection over union of their pixels",
    r"macc": "mean over classes of the share of their pixels that is found",
    r"aacc": "share of all pixels with the right class",
    r"top1_accuracy": "share of images whose first guess is right",
    r"top5_accuracy": "share of images whose class is among the first five guesses",
}
KINDS_OF_SHAPES = ("box", "mask")
"""What a measure of objects is of."""


def measure_of(metric: str) -> str:
    """A metric's name without the kind of shape that it is of.

    Args:
        metric: As ``Metric.compute`` names it.
    """
    kind, _, measure = metric.partition("_")
    return measure if kind in KINDS_OF_SHAPES else metric


def words_of(measure: str) -> str:
    """A measure's meaning by its name; empty for one that is not known."""
    for pattern, words in _WORDS.items():
        if match := re.fullmatch(pattern, measure):
            return match.expand(words)
    return ""
