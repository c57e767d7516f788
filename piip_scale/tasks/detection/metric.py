"""COCO average precision of boxes and masks, over all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from piip_scale.agreement import gathered_on_main, on_main
from piip_scale.data.batch import Batch
from piip_scale.data.reading.files import json_bytes, write_bytes
from piip_scale.data.reading.mask_checks import checked_segmentation
from piip_scale.errors import DataError
from piip_scale.logging import get_logger
from piip_scale.tasks.absences import absences
from piip_scale.tasks.base import Detections
from piip_scale.tasks.detection.cases import detection_cases
from piip_scale.tasks.detection.confusion import MIN_IOU, MIN_SCORE, NOTHING, confusion_of
from piip_scale.tasks.detection.error_kinds import error_kinds
from piip_scale.tasks.detection.pr_curves import ALL_CLASSES, Floats, pr_curves
from piip_scale.tasks.detection.scoring import Result, Scores, Scoring, score
from piip_scale.tasks.report import Report


class CocoMetric:
    """Collects detections of a validation set and scores them: a ``Metric``.

    Args:
        ground_truth: A COCO dict with ``images``, ``annotations`` and ``categories``. Categories are in label order.
        with_masks: Score masks too; every annotation then has a ``segmentation``.
        scoring: How.

    Attributes:
        truth: The ground truth, complete and checked.
        parts: What is scored, ``box`` and perhaps ``mask``.
        scores: By part, on rank 0 after ``compute``.

    Raises:
        DataError: Masks are scored, and one is none or does not fill its image.
    """

    def __init__(self, ground_truth: dict[str, Any], with_masks: bool, scoring: Scoring | None = None) -> None:
        self._categories = ground_truth["categories"]
        self._sizes_px = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
        annotations = _complete(ground_truth["annotations"])
        if with_masks:
            annotations = [self._with_mask(annotation) for annotation in annotations]
        self.truth = ground_truth | {"annotations": annotations}
        self.parts = ("box", "mask") if with_masks else ("box",)
        self.scoring = scoring or Scoring()
        self.scores: dict[str, Scores] = {}
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
            ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_s``, ``box_ap_m``, ``box_ap_l``; average recalls
            ``box_ar1``, ``box_ar10``, ``box_ar100``, ``box_ar_s``, ``box_ar_m``, ``box_ar_l``; and
            ``per_class/box_ap50/NAME`` for every class; with masks the same for ``mask_``. Other styles have measures
            of their own.
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

    def checked_result(self, result: Result) -> Result:
        """A result from elsewhere whose mask fills its image.

        Raises:
            DataError: It does not.
        """
        mask = self._checked_mask(result["segmentation"], result["image_id"], "a detection")
        return result | {"segmentation": mask}

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

    def pr_curves(self) -> dict[str, Floats]:
        """Precision and recall by score, on rank 0 after ``compute``; nothing elsewhere.

        By ``PART``, means over classes, and by ``PART/NAME``.
        """
        names = {category["id"]: category["name"] for category in self._categories}
        counts = self._num_objects()
        return {
            part if name == ALL_CLASSES else f"{part}/{name}": curve
            for part, found in self.scores.items()
            for name, curve in pr_curves(found, counts, names).items()
        }

    def report(self) -> Report | None:
        """Tables and curves, on rank 0 after ``compute``; ``None`` elsewhere. Collective."""
        results = self.results()
        return self.report_results(results) if self.scores else None

    def report_results(self, results: Sequence[Result]) -> Report:
        """The same of results from elsewhere, after ``score_results``. Not collective."""
        ids = [category["id"] for category in self._categories]
        names = [category["name"] for category in self._categories]
        counts = self._num_objects()
        columns: dict[str, list[float]] = {"objects": [counts[number] for number in ids]}
        columns |= {
            f"{part}_{measure}": [values[number] for number in ids]
            for part, found in self.scores.items()
            for measure, values in found.of_classes.items()
        }
        places = [sorted(ids).index(number) for number in ids]
        errors = {part: error_kinds(self.truth, results, part, self.scoring.most) for part in self.parts}
        return Report(
            names,
            columns,
            confusion_of(self.truth, [result for result in results if "bbox" in result], ids),
            [*names, NOTHING],
            f"Objects (rows) by what they are found as, IoU >= {MIN_IOU}, score >= {MIN_SCORE}; percent of rows",
            {part: found.precision_RK[:, places] for part, found in self.scores.items()},
            errors,
            list(detection_cases(errors[self.parts[-1]].tallies, results, self._categories)),
        )

    def _num_objects(self) -> Counter[int]:
        """By category id; regions to ignore left out."""
        return Counter(note["category_id"] for note in self.truth["annotations"] if not note["iscrowd"])

    def score_results(self, results: Sequence[Result]) -> dict[str, float]:
        """The metrics of results from elsewhere; see ``compute``. Not collective."""
        return self._all_scores(list(results))

    def _all_scores(self, results: list[Result]) -> dict[str, float]:
        scores = {key: value for part in self.parts for key, value in self._scores(part, results).items()}
        for line in absences(scores):
            get_logger(__name__).info(line)
        return scores

    def _scores(self, part: str, results: list[Result]) -> dict[str, float]:
        found = self.scores[part] = score(self.truth, results, part, self.scoring)
        means = {f"{part}_{name}": value for name, value in found.means.items()}
        of_classes = found.of_classes["ap50"]
        return means | {f"per_class/{part}_ap50/{c['name']}": of_classes[c["id"]] for c in self._categories}


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
