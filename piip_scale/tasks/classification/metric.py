"""Top-1 and top-5 accuracy, over all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from piip_scale.agreement import gathered_on_main, is_main_rank, on_main
from piip_scale.data.batch import ClassificationBatch
from piip_scale.data.reading.files import json_bytes, write_bytes
from piip_scale.tasks.classification.cases import class_case
from piip_scale.tasks.classification.model import NUM_BEST, Classification
from piip_scale.tasks.report import Report


@dataclass(frozen=True)
class _Answer:
    """An image's class, and the best guesses with their probabilities."""

    label: int
    guesses: tuple[int, ...]
    probabilities: tuple[float, ...]


class AccuracyMetric:
    """Counts how often the right class is the first, or among the first five: a ``Metric``.

    Args:
        classes: Names in label order.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = classes
        self._answers: dict[int, _Answer] = {}

    def update(self, batch: ClassificationBatch, predictions: Sequence[Classification]) -> None:
        """Adds one batch's predictions; an image seen before, as at a padded end, counts once."""
        for found, label in zip(predictions, batch.labels.tolist(), strict=True):
            answer = _Answer(label, tuple(found.labels.tolist()), tuple(found.probabilities.tolist()))
            self._answers.setdefault(found.image_id, answer)

    def compute(self) -> dict[str, float]:
        """Shares of the images, 0-1. Collective: every rank calls it; the result is the same on all.

        Returns:
            ``top1_accuracy``, and ``top5_accuracy`` where there are more than five classes.
        """
        merged = self._merged()
        return on_main(lambda: self._scores(list(merged.values())))

    def _scores(self, answers: Sequence[_Answer]) -> dict[str, float]:
        ranks = [1, NUM_BEST] if len(self._classes) > NUM_BEST else [1]
        return {f"top{k}_accuracy": sum(a.label in a.guesses[:k] for a in answers) / len(answers) for k in ranks}

    def pr_curves(self) -> dict[str, npt.NDArray[np.float64]]:
        """Nothing: of each image only the best guesses are kept."""
        return {}

    def report(self) -> Report | None:
        """Accuracy by class and confusion, on rank 0; ``None`` elsewhere. Collective."""
        answers = self._merged()
        return self._report(answers) if is_main_rank() else None

    def _report(self, answers_by_id: Mapping[int, _Answer]) -> Report:
        answers = answers_by_id.values()
        counts = np.zeros((len(self._classes),) * 2, np.int64)
        for answer in answers:
            counts[answer.label, answer.guesses[0]] += 1
        of_class = counts.sum(1)
        accuracy = [float(right / n) if n else -1.0 for right, n in zip(counts.diagonal(), of_class, strict=True)]
        columns = {"images": of_class.tolist(), "top1_accuracy": accuracy}
        if len(self._classes) > NUM_BEST:
            columns["top5_accuracy"] = self._best_five(answers)
        title = "Images by class (row) and first guess (column); percent of rows"
        cases = [
            class_case(image_id, one.label, one.guesses, one.probabilities, self._classes)
            for image_id, one in sorted(answers_by_id.items())
        ]
        return Report(self._classes, columns, counts, self._classes, title, cases=cases)

    def _best_five(self, answers: Iterable[_Answer]) -> list[float]:
        """By class, how often it was among the first guesses; -1 for a class without images."""
        found: dict[int, list[bool]] = defaultdict(list)
        for answer in answers:
            found[answer.label].append(answer.label in answer.guesses[:NUM_BEST])
        return [sum(found[k]) / len(found[k]) if found[k] else -1.0 for k in range(len(self._classes))]

    def write_results(self, path: Path) -> None:
        """Writes every image's class and best guesses, whole or not at all. Collective; rank 0 writes.

        Raises:
            DataError: The disk is full, or the folder cannot be written; on every rank.
        """
        merged = self._merged()
        entries = [{"image_id": number, **self._entry(merged[number])} for number in sorted(merged)]
        on_main(lambda: write_bytes(path, json_bytes(entries)))

    def _entry(self, answer: _Answer) -> dict[str, object]:
        guesses = [self._classes[label] for label in answer.guesses]
        return {"class": self._classes[answer.label], "guesses": guesses, "probabilities": answer.probabilities}

    def _merged(self) -> dict[int, _Answer]:
        """All ranks' answers, on rank 0 alone. Collective."""
        merged: dict[int, _Answer] = {}
        for part in gathered_on_main(self._answers):
            merged |= part
        return merged
