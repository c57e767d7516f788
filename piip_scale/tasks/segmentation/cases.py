"""How a segmentor did on single images; the label maps of the best and the worst are kept."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import PIL.Image

from piip_scale.data.images import Image
from piip_scale.tasks.base import Segmentation
from piip_scale.tasks.cases import MOST_CASES, Case
from piip_scale.tasks.drawing import DrawingStyle, draw_label_map

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class KeptMap:
    """A label map in little memory.

    Attributes:
        score: Mean IoU of the classes that occur in its image, 0 to 1.
        content: Its labels, compressed.
        size_px: Its height and width.
    """

    score: float
    content: bytes
    size_px: tuple[int, int]

    def labels_HW(self) -> npt.NDArray[np.uint8]:  # noqa: N802 - the shape
        """The labels, uint8 (H, W)."""
        return np.frombuffer(zlib.decompress(self.content), np.uint8).reshape(self.size_px)


def image_iou(cells: Counts, numbers: Counts, num_classes: int) -> float:
    """Mean IoU of the classes that occur in an image, in truth or found; NaN where none does.

    Args:
        cells: ``truth * num_classes + found`` of its pixels, each once.
        numbers: How many pixels of each.
        num_classes: Classes.
    """
    truth, found = np.divmod(cells, num_classes)
    true, taken, right = (
        np.bincount(labels, weights, num_classes)
        for labels, weights in ((truth, numbers), (found, numbers), (truth, numbers * (truth == found)))
    )
    union = true + taken - right
    return float((right[union > 0] / union[union > 0]).mean()) if union.any() else float("nan")


def keep(kept: dict[int, KeptMap], found: Segmentation, score: float) -> None:
    """Keeps a map if it is among the best or the worst so far, and drops the one that no longer is."""
    scores = sorted(one.score for one in kept.values())
    is_extreme = len(kept) < 2 * MOST_CASES or score < scores[MOST_CASES - 1] or score > scores[-MOST_CASES]
    if score != score or not is_extreme:
        return
    labels = found.labels_HW.numpy()
    content = zlib.compress(np.ascontiguousarray(labels).tobytes(), level=1)
    kept[found.image_id] = KeptMap(score, content, (labels.shape[0], labels.shape[1]))
    if len(kept) > 2 * MOST_CASES:
        ranked = sorted(kept, key=lambda image_id: kept[image_id].score)
        del kept[ranked[MOST_CASES]]


def map_cases(kept: Mapping[int, KeptMap], classes: Sequence[str]) -> list[Case]:
    """A case for each map that was kept."""
    return [
        Case(image_id, one.score, f"mean IoU {one.score:.3f}", partial(_draw, one, classes))
        for image_id, one in sorted(kept.items())
    ]


def _draw(kept: KeptMap, classes: Sequence[str], pixels: Image, style: DrawingStyle) -> PIL.Image.Image:
    return draw_label_map(pixels, kept.labels_HW(), classes, style)
