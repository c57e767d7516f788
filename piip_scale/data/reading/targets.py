"""What a packed set has to train on, and what training leaves out of it, by class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from piip_scale.config.base import Strict
from piip_scale.data.reading.decoding import MIN_BOX_PX
from piip_scale.data.set_kinds import SET_KINDS
from piip_scale.errors import DataError
from piip_scale.registry import SetKind

Reason = Literal["", "ignored", "tiny", "unlabelled"]
"""Why something is no training target; empty where it is one."""

Counts = Counter[tuple[int, Reason]]
"""How many by label and reason."""

_WORDS = {
    "ignored": "ignored or crowds",
    "tiny": f"under {MIN_BOX_PX:g} px wide or high",
    "unlabelled": "of no class",
}
_NO_LABEL = -1
_MOST_CLASSES = 10
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_MUCH_UNLABELLED = 0.5


class Targets(Strict):
    """A set's training targets in numbers: objects, images or pixels, by its kind.

    Attributes:
        trainable: Of each class, in label order.
        left_out: What is no target: by reason, of each class in label order (pixels of no class: one number).
    """

    trainable: tuple[_Count, ...]
    left_out: dict[Literal["ignored", "tiny", "unlabelled"], tuple[_Count, ...]] = {}

    @property
    def num_trainable(self) -> int:
        """Of all classes."""
        return sum(self.trainable)

    @property
    def num_left_out(self) -> int:
        """Of all classes and reasons."""
        return sum(map(sum, self.left_out.values()))


def object_counts(notes: Mapping[str, Any], label_of_category: Mapping[int, int]) -> Counts:
    """Counts a sample's annotations as ``decode_sample`` and the trainer take them."""
    return annotation_counts(notes["annotations"], label_of_category)


def annotation_counts(annotations: Iterable[Mapping[str, Any]], label_of_category: Mapping[int, int]) -> Counts:
    """Counts annotations, of any number of samples."""
    counts: Counts = Counter()
    for note in annotations:
        counts[label_of_category[note["category_id"]], _reason(note)] += 1
    return counts


def trainable_categories(annotations: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
    """The ids of the categories of which annotations can be trained on, ascending."""
    return tuple(sorted({note["category_id"] for note in annotations if not _reason(note)}))


def _reason(note: Mapping[str, Any]) -> Reason:
    return "ignored" if note["iscrowd"] else "tiny" if min(note["bbox"][2:]) < MIN_BOX_PX else ""


def label_counts(notes: Mapping[str, Any], label_of_category: Mapping[int, int]) -> Counts:
    """A sample of a classification set is one target."""
    return Counter({(notes["label"], ""): 1})


def no_counts(notes: Mapping[str, Any], label_of_category: Mapping[int, int]) -> Counts:
    """Nothing: a sample's targets stand in its label map."""
    return Counter()


def pixel_counts(pixels_of_class: Sequence[int]) -> Counts:
    """Counts of label maps.

    Args:
        pixels_of_class: In label order, and at the end those of no class; or nothing.
    """
    counts: Counts = Counter({(label, ""): count for label, count in enumerate(pixels_of_class[:-1])})
    if pixels_of_class:
        counts[_NO_LABEL, "unlabelled"] = pixels_of_class[-1]
    return counts


def targets_of(counts: Counts, num_classes: int) -> Targets:
    """Counts as they stand in a manifest: reasons that do not occur are left out."""
    reasons = sorted({reason for (_, reason), count in counts.items() if reason and count})
    labels = {reason: (_NO_LABEL,) if counts[_NO_LABEL, reason] else range(num_classes) for reason in reasons}
    return Targets(
        trainable=tuple(counts[label, ""] for label in range(num_classes)),
        left_out={reason: tuple(counts[label, reason] for label in labels[reason]) for reason in reasons},
    )


def targets_lines(kind: SetKind, classes: Sequence[str], targets: Targets) -> list[str]:
    """What is worth knowing before a training: how many targets, what is left out and why, classes without any."""
    unit, in_shares = SET_KINDS[kind].unit, SET_KINDS[kind].in_shares
    num_all = targets.num_trainable + targets.num_left_out

    def shown(count: int) -> str:
        return f"{count / max(num_all, 1):.1%}" if in_shares else str(count)

    all_shown = "the" if in_shares else str(num_all)
    lines = [f"{shown(targets.num_trainable)} of {all_shown} {unit} can be trained on"]
    if targets.num_left_out:
        why = [f"{shown(sum(of_class))} {_WORDS[reason]}" for reason, of_class in targets.left_out.items()]
        lines[0] += f"; left out: {', '.join(why)}"
    lines += _lines_of_classes(classes, targets)
    if targets.num_trainable and (empty := [classes[i] for i, count in enumerate(targets.trainable) if not count]):
        more = ", ..." if len(empty) > _MOST_CLASSES else ""
        lines.append(f"classes without {unit} to train on: {', '.join(empty[:_MOST_CLASSES])}{more}")
    if sum(targets.left_out.get("unlabelled", ())) > _MUCH_UNLABELLED * num_all:
        lines.append("most pixels are of no class: is 255, or 0 with --reduce-zero-label, meant to be one?")
    return lines


def check_targets(kind: SetKind, targets: Targets, location: str, num_samples: int) -> None:
    """Holds a set that has annotations to having something to train on.

    Args:
        kind: Of the set.
        targets: Its targets.
        location: The set, for the message.
        num_samples: Its images.

    Raises:
        DataError: All is left out.
    """
    if targets.num_trainable or not targets.num_left_out:
        return
    why = ", ".join(f"{sum(of_class)} {_WORDS[reason]}" for reason, of_class in targets.left_out.items())
    fix = "correct the annotations"
    if "tiny" in targets.left_out:
        fix = "are they coordinates of 0-1? boxes are x, y, width, height in px of the image"
    elif "unlabelled" in targets.left_out:
        fix = "255 is no class: number the classes from 0"
    raise DataError(
        f"nothing in {location} can be trained on: of {targets.num_left_out} {SET_KINDS[kind].unit} "
        f"in {num_samples} images, {why}",
        fix=fix,
    )


def check_trainable(kind: SetKind, targets: Targets, location: str, num_samples: int) -> None:
    """Holds a training set to having something to train on, annotations or not.

    Raises:
        DataError: It has nothing.
    """
    check_targets(kind, targets, location, num_samples)
    if not targets.num_trainable:
        raise DataError(
            f"nothing in {location} can be trained on: its {num_samples} images have no {SET_KINDS[kind].unit}",
            fix="check the annotations, and pack the set again",
        )


def _lines_of_classes(classes: Sequence[str], targets: Targets) -> list[str]:
    lines = []
    for label, name in enumerate(classes):
        left_out = {reason: of[label] for reason, of in targets.left_out.items() if reason != "unlabelled"}
        why = [f"{count} {_WORDS[reason]}" for reason, count in left_out.items() if count]
        if why:
            total = targets.trainable[label] + sum(left_out.values())
            lines.append(f"class {name}: {targets.trainable[label]} of {total}; left out: {', '.join(why)}")
    if len(lines) > _MOST_CLASSES:
        lines[_MOST_CLASSES:] = [f"... and {len(lines) - _MOST_CLASSES} more classes"]
    return lines
