"""The kinds of packed sets, one row each: how they differ when they are read, checked and shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from piip_scale.registry import SetKind


@dataclass(frozen=True)
class SetKindRow:
    """What differs between kinds of sets; parts are named as ``module:attribute``, imported when asked for.

    Attributes:
        notes: Keys of a sample's annotations.
        targets: What its samples are labelled with, for people.
        packed_targets: What its annotations are, likewise.
        unit: What can be trained on is counted in these.
        in_shares: They are reported as shares of all, not as numbers.
        counts: What of a sample can be trained on, by its annotations: of notes and labels of categories, to
            ``Counts``; empty where that takes its files.
        check: Decodes a sample whole and looks at its labels: of set, raw sample and number, to targets, pixels and
            ``Counts``.
        summary: What it holds, for people: of a set, to rows of a name and a text.
        picture: A sample and its labels, drawn: of set, number and ``DrawingStyle``.
    """

    notes: frozenset[str]
    targets: str
    packed_targets: str
    unit: str
    in_shares: bool
    counts: str
    check: str
    summary: str
    picture: str

    def load(self, part: str) -> Callable[..., Any]:
        """The part of this name, imported."""
        module, _, attribute = getattr(self, part).partition(":")
        found: Callable[..., Any] = getattr(import_module(module), attribute)
        return found


SET_KINDS: dict[SetKind, SetKindRow] = {
    "detection": SetKindRow(
        notes=frozenset({"image_id", "file_name", "height", "width", "annotations"}),
        targets="objects",
        packed_targets="boxes",
        unit="objects",
        in_shares=False,
        counts="piip_scale.data.reading.targets:object_counts",
        check="piip_scale.data.packing.verify:look_at_objects",
        summary="piip_scale.data.packing.summary_rows:object_rows",
        picture="piip_scale.tasks.detection.sample_picture:draw_objects",
    ),
    "classification": SetKindRow(
        notes=frozenset({"image_id", "file_name", "label"}),
        targets="labels",
        packed_targets="labels",
        unit="images",
        in_shares=False,
        counts="piip_scale.data.reading.targets:label_counts",
        check="piip_scale.data.packing.verify:look_at_label",
        summary="piip_scale.data.packing.summary_rows:label_rows",
        picture="piip_scale.tasks.classification.sample_picture:draw_label",
    ),
    "segmentation": SetKindRow(
        notes=frozenset({"image_id", "file_name"}),
        targets="label maps",
        packed_targets="label maps",
        unit="pixels",
        in_shares=True,
        counts="piip_scale.data.reading.targets:no_counts",
        check="piip_scale.data.packing.verify:look_at_map",
        summary="piip_scale.data.packing.summary_rows:map_rows",
        picture="piip_scale.tasks.segmentation.sample_picture:draw_map",
    ),
}
"""By the kind that a manifest names."""
