"""COCO average precision of boxes and masks, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from piip_scale.agreement import gathered_on_main, on_main
from piip_scale.data.batch import Batch
from piip_scale.data.reading.files import json_bytes, write_bytes
from piip_scale.data.reading.mask_checks import checked_segmentation
from piip_scale.errors import DataError
from piip_scale.logging import get_logger
from piip_scale.tasks.absences import absences
from piip_scale.tasks.base import Detections

Result = dict[str, Any]

_IOU_TYPES = {"box": "bbox", "mask": "segm"}
_STATS = {
    "ap": "AP_all",
    "ap50": "AP_50",
    "ap75": "AP_75",
    "ap_s": "AP_small",
    "ap_m": "AP_medium",
    "ap_l": "AP_large",
}
_ALL_AREAS, _MOST_DETECTIONS = 0, -1


class CocoMetric:
    """Collects detections of a validation set and scores them: a ``Metric``.

    Args:
        ground_truth: A COCO dict with ``images``, ``annotations`` and ``categories``. Categories are in label order.
        with_masks: Score masks too; every annotation then has a ``segmentation``.

    Raises:
        DataError: Masks are scored, and one is none or does not fill its image.
    """

    def __init__(self, ground_truth: dict[str, Any], with_masks: bool) -> None:
        self._categories = ground_truth["categories"]
        self._sizes_px = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
        annotations = _complete(ground_truth["annotations"])
        if with_masks:
            annotations = [self._with_mask(annotation) for annotation in annotations]
        self._ground_truth = ground_truth | {"annotations": annotations}
        self._parts = ("box", "mask") if with_masks else ("box",)
        self._results: dict[int, list[Result]] = {}

    def update(self, batch: Batch, predictions: Sequence[Detections]) -> None:
        """Adds one batch's detections; an image seen before, as at a padded end, counts once.

        Raises:
            DataError: A mask is none or does not fill its image.
        """
        ids = [category["id"] for category in self._categories]
        for found in predictions:
            for rle in found.masks_rle or ():
                self._checked_mask(rle, found.image_id, "a detection")
            self._results.setdefault(found.image_id, coco_results(found, ids))

    def results(self) -> list[Result]:
        """All ranks' detections as COCO results, every image once; on rank 0 alone. Collective."""
        merged: dict[int, list[Result]] = {}
        for part in gathered_on_main(self._results):
            merged = part | merged
        return [result for image_id in sorted(merged) for result in merged[image_id]]

    def compute(self) -> dict[str, float]:
        """Average precisions, 0-1; -1 where the set holds no such objects, as COCO has it.

        Collective: every rank calls it; rank 0 computes, and the result is the same on all.

        Raises:
            PiipError: Scoring failed, on every rank.

        Returns:
            ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_s``, ``box_ap_m``, ``box_ap_l``, and
            ``per_class/box_ap50/NAME`` for every class; with masks the same for ``mask_``.
        """
        results = self.results()
        return on_main(lambda: self._all_scores(results))

    def write_results(self, path: Path) -> None:
        """Writes ``results`` as a COCO results file, whole or not at all. Collective; rank 0 writes.

        Raises:
            DataError: The disk is full, or the folder cannot be written; on every rank.
        """
        results = self.results()
        on_main(lambda: write_bytes(path, json_bytes(results)))

    def _with_mask(self, annotation: dict[str, Any]) -> dict[str, Any]:
        name = f"annotation {annotation['id']}"
        mask = self._checked_mask(annotation.get("segmentation"), annotation["image_id"], name)
        return annotation | {"segmentation": mask}

    def _checked_mask(self, mask: Any, image_id: int, owner: str) -> Any:
        # Comparing run lengths that fall short never ends, in C code that no signal reaches.
        try:
            checked = checked_segmentation(mask, *self._sizes_px[image_id])
            if checked is None:
                raise ValueError("it is empty")
        except (KeyError, ValueError) as error:
            reason = "the set has no such image" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"mask of {owner} of image {image_id}",
                value=reason,
                rule="masks that are scored fill their image",
                fix="pack the set again, or correct the heads that made it",
            ) from None
        return checked

    def _all_scores(self, results: list[Result]) -> dict[str, float]:
        scores = {key: value for part in self._parts for key, value in self._scores(part, results).items()}
        for line in absences(scores):
            get_logger(__name__).info(line)
        return scores

    def _scores(self, part: str, results: list[Result]) -> dict[str, float]:
        from faster_coco_eval import COCO, COCOeval_faster

        truth = COCO(self._ground_truth)
        # Fresh dicts, because loading adds to them; without boxes, so that masks are sized by their own area.
        drop = "bbox" if part == "mask" else "segmentation"
        found = truth.loadRes([{k: v for k, v in result.items() if k != drop} for result in results])
        evaluation = COCOeval_faster(truth, found, iouType=_IOU_TYPES[part])
        evaluation.run()
        stats = evaluation.stats_as_dict
        scores = {f"{part}_{key}": float(stats[name]) for key, name in _STATS.items()}
        return scores | {f"per_class/{part}_ap50/{name}": value for name, value in self._class_ap50(evaluation).items()}

    def _class_ap50(self, evaluation: Any) -> dict[str, float]:
        at_50 = int(np.flatnonzero(np.isclose(evaluation.params.iouThrs, 0.5))[0])
        # (recall, class), classes by rising category id
        precision = evaluation.eval["precision"][at_50, :, :, _ALL_AREAS, _MOST_DETECTIONS]
        columns = {category_id: precision[:, k] for k, category_id in enumerate(evaluation.params.catIds)}
        return {c["name"]: float(columns[c["id"]].mean()) for c in self._categories}


def coco_results(found: Detections, category_ids: Sequence[int]) -> list[Result]:
    """One image's detections as entries of a COCO results file.

    Args:
        found: The detections.
        category_ids: COCO category id of each label.
    """
    corners, sizes = found.boxes_xyxy_px[:, :2], found.boxes_xyxy_px[:, 2:] - found.boxes_xyxy_px[:, :2]
    results: list[Result] = [
        {"image_id": found.image_id, "category_id": category_ids[label], "bbox": corner + size, "score": score}
        for label, corner, size, score in zip(
            found.labels.tolist(), corners.tolist(), sizes.tolist(), found.scores.tolist(), strict=True
        )
    ]
    for result, rle in zip(results, found.masks_rle or (), strict=found.masks_rle is not None):
        result["segmentation"] = rle
    return results


def _complete(annotations: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Annotations with the optional keys filled in, numbered from 1: to evaluators an id of 0 is no match."""
    return [
        {"iscrowd": 0, "area": annotation["bbox"][2] * annotation["bbox"][3], **annotation, "id": number}
        for number, annotation in enumerate(annotations, start=1)
    ]
