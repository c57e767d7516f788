"""Why detections are wrong and objects not found, by the kinds of TIDE, and what each kind costs.

Source: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020. Unlike in its tool,
classes without objects do not count in the mean, as in COCO's, and what COCO ignores, in a crowd, is no error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from piip_scale.tasks.detection.confusion import MIN_SCORE
from piip_scale.tasks.detection.sample_picture import run_lengths

Floats = npt.NDArray[np.float64]

FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1
KINDS = {
    "classification": "on an object of another class (IoU of 0.5 or more)",
    "localisation": "on an object of its class, and badly (IoU of 0.1 to 0.5)",
    "both": "on an object of another class, and badly",
    "duplicate": "on an object of its class that a better detection has",
    "background": "on no object (IoU below 0.1)",
    "missed": "an object without any detection that is on it, or nearly so",
}
"""In TIDE's order, with what each means."""
_CLASSIFICATION, _LOCALISATION, _BOTH, _DUPLICATE, _BACKGROUND, _MISSED = range(len(KINDS))
_RIGHT = -1
_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class ErrorKinds:
    """What keeps a detector from a perfect average precision at an IoU of 0.5.

    Attributes:
        ap50: That precision, 0 to 1.
        counts: Errors of each kind, of all detections that count.
        costs: By how much ``ap50`` would rise if all errors of a kind alone were mended, 0 to 1.
        tallies: Of each image, from detections of a score that is drawn.
    """

    ap50: float
    counts: Mapping[str, int]
    costs: Mapping[str, float]
    tallies: Sequence[Tally]


@dataclass(frozen=True)
class Tally:
    """How an image went.

    Attributes:
        image_id: The image's.
        right: Detections on an object of their class.
        wrong: Others.
        missed: Objects without one.
    """

    image_id: int
    right: int
    wrong: int
    missed: int

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall, 0 to 1; 1 where there is nothing to find and nothing found."""
        among = 2 * self.right + self.wrong + self.missed
        return 2 * self.right / among if among else 1.0


@dataclass
class _Points:
    """Detections of all images, one after the other: class, score, kind of error, and what mending makes of each."""

    classes: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    mended: list[int] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)

    def add(self, image: _Image) -> None:
        for index, kind in enumerate(image.kinds):
            if kind is not None:
                self.classes.append(int(image.found_classes[index]))
                self.scores.append(float(image.scores[index]))
                self.kinds.append(kind)
                self.mended.append(image.mended.get(index, _RIGHT))
        self.missed += [int(image.classes[place]) for place in image.missed]


def error_kinds(truth: Mapping[str, Any], results: Iterable[Mapping[str, Any]], part: str, most: int) -> ErrorKinds:
    """Sorts the errors of results by kind.

    Args:
        truth: A COCO dict whose annotations are complete; with LVIS's keys, classes that an image is not labelled with
            are left out.
        results: Entries of a COCO results file with what ``part`` needs.
        part: ``box`` or ``mask``.
        most: The best so many detections of an image count.
    """
    found, objects = defaultdict(list), defaultdict(list)
    for result in results:
        found[result["image_id"]].append(result)
    for note in truth["annotations"]:
        objects[note["image_id"]].append(note)
    points, tallies = _Points(), []
    for image in truth["images"]:
        best = sorted(found[image["id"]], key=lambda result: -result["score"])[:most]
        judged = _Image(image, objects[image["id"]], best, part)
        points.add(judged)
        tallies.append(judged.tally())
    numbers = defaultdict[int, int](int)
    for note in truth["annotations"]:
        numbers[note["category_id"]] += not note["iscrowd"]
    return _costs(points, {number: count for number, count in numbers.items() if count}, tallies)


class _Image:
    """One image's detections, best first, held to its objects.

    Attributes:
        kinds: Of each detection, ``_RIGHT`` or the kind of its error; ``None`` where it counts for nothing.
        mended: By detection, the class that it is right of once its error is mended; those that mending removes are
            left out.
        missed: Places of objects that no detection is on, or could be mended to be.
    """

    def __init__(
        self,
        image: Mapping[str, Any],
        notes: Sequence[Mapping[str, Any]],
        found: Sequence[Mapping[str, Any]],
        part: str,
    ) -> None:
        self._image, self._found, self._part = image, found, part
        self._objects = [note for note in notes if not note["iscrowd"]]
        self._crowds = [note for note in notes if note["iscrowd"]]
        self.classes = np.array([note["category_id"] for note in self._objects], int)
        self.found_classes = np.array([result["category_id"] for result in found], int)
        self.scores = np.array([result["score"] for result in found], float)
        self._ious = self._overlaps(self._objects, crowds=False)
        self._is_own = self.found_classes[:, None] == self.classes[None, :]
        self._holder: dict[int, int] = {}
        self.kinds: list[int | None] = [*self._matched()]
        self.mended = dict(self._mended())
        claimed = {place for place, _ in self._claims()}
        self.missed = [p for p in range(len(self._objects)) if p not in self._holder and p not in claimed]

    def tally(self) -> Tally:
        """Of detections of a score that is drawn."""
        shown = [kind for kind, score in zip(self.kinds, self.scores, strict=True) if score >= MIN_SCORE]
        right = shown.count(_RIGHT)
        wrong = sum(kind not in (None, _RIGHT) for kind in shown)
        return Tally(self._image["id"], right, wrong, len(self._objects) - right)

    def _matched(self) -> Iterator[int | None]:
        """Each takes the free object of its class that it overlaps most, the best first; then errors have a kind."""
        free = np.where(self._is_own, self._ious, 0.0)
        own = free.max(1, initial=0.0)
        other = np.where(self._is_own, 0.0, self._ious).max(1, initial=0.0)
        right = set()
        for index in np.flatnonzero(own >= FOREGROUND_IOU).tolist():
            place = int(free[index].argmax())
            if free[index, place] >= FOREGROUND_IOU:
                self._holder[place] = index
                free[:, place] = 0.0
                right.add(index)
        ignored = self._ignored()
        for index, overlaps in enumerate(zip(own.tolist(), other.tolist(), strict=True)):
            yield _RIGHT if index in right else None if ignored[index] else _kind(*overlaps)

    def _claims(self) -> Iterator[tuple[int, int]]:
        """Places of free objects that a detection would have if its error were mended, and the detection."""
        for index, kind in enumerate(self.kinds):
            if kind in (_CLASSIFICATION, _LOCALISATION):
                which = self._is_own[index] if kind == _LOCALISATION else ~self._is_own[index]
                place = int(np.where(which, self._ious[index], -1.0).argmax())
                if place not in self._holder:
                    yield place, index

    def _mended(self) -> Iterator[tuple[int, int]]:
        """The best claimant of each object gets it; the others would be duplicates."""
        best: dict[int, int] = {}
        for place, index in self._claims():
            best.setdefault(place, index)
        for place, index in best.items():
            yield index, int(self.classes[place])

    def _overlaps(self, notes: Sequence[Mapping[str, Any]], *, crowds: bool) -> Floats:
        """Intersection over union, over the detection's own area for crowds: float64 (found, notes)."""
        if not self._found or not notes:
            return np.zeros((len(self._found), len(notes)))
        ours, theirs = self._shapes(self._found), self._shapes(notes)
        return np.asarray(coco_mask.iou(ours, theirs, [int(crowds)] * len(notes)), np.float64)

    def _shapes(self, entries: Sequence[Mapping[str, Any]]) -> Floats | list[dict[str, Any]]:
        if self._part == "box":
            return np.array([entry["bbox"] for entry in entries], np.float64)
        size_px = self._image["height"], self._image["width"]
        return [run_lengths(entry["segmentation"], size_px) for entry in entries]

    def _ignored(self) -> npt.NDArray[np.bool_]:
        """Of detections that are none of an object: those in a crowd of their class, or of classes nobody labelled."""
        inside = self._overlaps(self._crowds, crowds=True) >= FOREGROUND_IOU
        crowd_classes = np.array([note["category_id"] for note in self._crowds], int)
        ignored: npt.NDArray[np.bool_] = (inside & (self.found_classes[:, None] == crowd_classes[None, :])).any(1)
        if "neg_category_ids" in self._image:
            known = {*self.classes.tolist(), *self._image["neg_category_ids"]}
            known -= set(self._image["not_exhaustive_category_ids"])
            ignored |= ~np.isin(self.found_classes, list(known))
        return ignored


def _kind(own: float, other: float) -> int:
    """The kind of a wrong detection, by its IoU with the best object of its class, and of any other."""
    if BACKGROUND_IOU <= own < FOREGROUND_IOU:
        return _LOCALISATION
    if other >= FOREGROUND_IOU:
        return _CLASSIFICATION
    if own >= FOREGROUND_IOU:
        return _DUPLICATE
    return _BOTH if other > BACKGROUND_IOU else _BACKGROUND


def _costs(points: _Points, numbers: Mapping[int, int], tallies: Sequence[Tally]) -> ErrorKinds:
    classes, scores = np.array(points.classes, int), np.array(points.scores, float)
    kinds, mended = np.array(points.kinds, int), np.array(points.mended, int)
    now = _mean_ap(classes, scores, kinds == _RIGHT, numbers)
    counts = [int((kinds == kind).sum()) for kind in range(_MISSED)] + [len(points.missed)]
    costs = []
    for kind in range(_MISSED):
        kept = (kinds != kind) | (mended != _RIGHT)
        is_mended = (kinds == kind) & (mended != _RIGHT)
        new_classes, right = np.where(is_mended, mended, classes), (kinds == _RIGHT) | is_mended
        costs.append(_mean_ap(new_classes[kept], scores[kept], right[kept], numbers) - now)
    left = {number: count - points.missed.count(number) for number, count in numbers.items()}
    costs.append(_mean_ap(classes, scores, kinds == _RIGHT, left) - now)
    # Less than nothing is the 101 places of recall, not a gain.
    gains = {name: max(cost, 0.0) for name, cost in zip(KINDS, costs, strict=True)}
    return ErrorKinds(now, dict(zip(KINDS, counts, strict=True)), gains, tallies)


def _mean_ap(
    classes: npt.NDArray[np.int_], scores: Floats, right: npt.NDArray[np.bool_], numbers: Mapping[int, int]
) -> float:
    """COCO's average precision at one IoU, over the classes that have objects."""
    aps = []
    for number, count in numbers.items():
        own = classes == number
        order = np.argsort(-scores[own], kind="stable")
        aps.append(_ap(right[own][order], count))
    return float(np.mean(aps)) if aps else 0.0


def _ap(right: npt.NDArray[np.bool_], num_objects: int) -> float:
    if not num_objects or not len(right):
        return 0.0
    rights = right.cumsum()
    precision = np.maximum.accumulate((rights / np.arange(1, len(right) + 1))[::-1])[::-1]
    places = np.searchsorted(rights / num_objects, _RECALLS)
    return float(np.append(precision, 0.0)[np.minimum(places, len(precision))].mean())
