"""Intersection over union of a segmentation set's classes, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from piip_scale.agreement import gathered, gathered_on_main, is_distributed, is_main_rank, on_main
from piip_scale.data.batch import SegmentationBatch
from piip_scale.data.reading.files import json_bytes, write_bytes
from piip_scale.data.reading.label_maps import IGNORED
from piip_scale.errors import DataError
from piip_scale.tasks.base import Segmentation
from piip_scale.tasks.report import Report
from piip_scale.tasks.segmentation.cases import KeptMap, image_iou, keep, map_cases

Counts = npt.NDArray[np.int64]


class SegmentationMetric:
    """Counts pixels by true and predicted class: a ``Metric``. The counts are exact, whatever the number of ranks.

    Args:
        classes: Names in label order.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = tuple(classes)
        self._pairs: dict[int, tuple[Counts, Counts]] = {}
        self._areas: dict[int, Counts] = {}
        self._kept: dict[int, KeptMap] = {}

    def update(self, batch: SegmentationBatch, predictions: Sequence[Segmentation]) -> None:
        """Adds one batch; an image seen before, as at a padded end, counts once.

        Raises:
            DataError: A label is none of the classes.
        """
        for found, truth, info in zip(predictions, batch.labels_BHW, batch.infos, strict=True):
            if found.image_id not in self._pairs:
                height, width = info.original_size_px
                self._add(found, truth[:height, :width].cpu())

    def _add(self, found: Segmentation, truth: Tensor) -> None:
        known = truth != IGNORED
        # Here and not where pixels are counted: that is between two collectives, where nothing may go wrong.
        for labels, owner in ((truth[known], "label map"), (found.labels_HW, "prediction")):
            if labels.numel() and int(labels.max()) >= len(self._classes):
                raise DataError(
                    f"{owner} of image {found.image_id}",
                    value=int(labels.max()),
                    rule=f"there are {len(self._classes)} classes, from 0",
                )
        pairs = truth[known].long() * len(self._classes) + found.labels_HW[known].long()
        # An image holds few of the possible pairs: counts of all of them would fill the memory.
        cells, numbers = np.unique(pairs.numpy(), return_counts=True)
        self._pairs[found.image_id] = cells, numbers
        self._areas[found.image_id] = np.bincount(found.labels_HW.numpy().ravel(), minlength=len(self._classes))
        keep(self._kept, found, image_iou(cells, numbers, len(self._classes)))

    def confusion(self) -> Counts:
        """Pixels by true (row) and predicted class, int64, every image once. Collective; the same on every rank."""
        size = len(self._classes)
        counts = np.zeros(size * size, np.int64)
        for image_id in self._own():
            cells, numbers = self._pairs[image_id]
            counts[cells] += numbers
        if is_distributed():
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            total = torch.from_numpy(counts).to(device)
            dist.all_reduce(total)
            counts = total.cpu().numpy()
        return counts.reshape(size, size)

    def _own(self) -> list[int]:
        """Images that this rank counts: those that no lower rank has seen."""
        seen = gathered(set(self._pairs))
        lower = set().union(*seen[: dist.get_rank()]) if is_distributed() else set()
        return sorted(set(self._pairs) - lower)

    def compute(self) -> dict[str, float]:
        """Mean intersection over union, mean class accuracy and accuracy of all pixels, 0 to 1.

        Means are over the classes that occur; NaN where none does. Collective; the same on every rank.

        Returns:
            ``miou``, ``macc``, ``aacc``, and ``per_class/iou/NAME`` for every class that occurs, in truth or found.
        """
        confusion = self.confusion().astype(np.float64)
        right, true, found = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        with np.errstate(invalid="ignore"):
            iou, accuracy = right / (true + found - right), right / true
            scores = {"miou": _mean(iou), "macc": _mean(accuracy), "aacc": float(right.sum() / true.sum())}
        named = zip(self._classes, iou.tolist(), strict=True)
        return scores | {f"per_class/iou/{name}": value for name, value in named if not np.isnan(value)}

    def pr_curves(self) -> dict[str, npt.NDArray[np.float64]]:
        """Nothing: a pixel's class has no score."""
        return {}

    def report(self) -> Report | None:
        """IoU and accuracy by class, and confusion of pixels, on rank 0; ``None`` elsewhere. Collective."""
        counts, kept = self.confusion(), gathered_on_main(self._kept)
        if not is_main_rank():
            return None
        right, true, found = counts.diagonal(), counts.sum(1), counts.sum(0)
        parts = {"iou": true + found - right, "accuracy": true}
        columns = {
            name: [float(a / b) if b else -1.0 for a, b in zip(right, of, strict=True)] for name, of in parts.items()
        }
        title = "Pixels by class (row) and prediction (column); percent of rows"
        all_columns = {"pixels": true.tolist()} | columns
        cases = map_cases({number: one for part in kept for number, one in part.items()}, self._classes)
        return Report(self._classes, all_columns, counts, self._classes, title, cases=cases)

    def write_results(self, path: Path) -> None:
        """Writes the area of every class in every image, whole or not at all. Collective; rank 0 writes.

        Raises:
            DataError: The disk is full, or the folder cannot be written; on every rank.
        """
        merged: dict[int, Counts] = {}
        for part in gathered_on_main(self._areas):
            merged = part | merged
        entries = [{"image_id": image_id} | area_shares(merged[image_id], self._classes) for image_id in sorted(merged)]
        on_main(lambda: write_bytes(path, json_bytes(entries)))


def area_shares(areas_px: Counts, classes: Sequence[str]) -> dict[str, Any]:
    """The share of an image that each class takes, largest first, as values for JSON.

    Args:
        areas_px: Pixels of each class.
        classes: Names in label order.
    """
    shares = areas_px / areas_px.sum()
    order = [int(label) for label in np.argsort(-shares, kind="stable") if areas_px[label]]
    return {"classes": [{"class": classes[label], "area_share": round(float(shares[label]), 6)} for label in order]}


def _mean(values: npt.NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
