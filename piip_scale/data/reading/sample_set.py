"""A set of samples to be read by number, whether it is packed or lies as its source has it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from piip_scale.data.reading.manifest import Category, MapRule
from piip_scale.data.reading.raw import RawSample
from piip_scale.registry import SetKind


class SampleSet(ABC):
    """A set, open for reading.

    Attributes:
        location: Where it lies, as the user wrote it.
        kind: What its samples are labelled with.
        keys: Name of every sample, N of them.
        categories: In label order.
        has_masks: Every annotation has a segmentation.
        map_rule: What the pixels of a segmentation set's label maps mean.
    """

    location: str
    keys: Sequence[str]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    @abstractmethod
    def kind(self) -> SetKind: ...  # noqa: D102 - an attribute

    @property
    @abstractmethod
    def categories(self) -> tuple[Category, ...]: ...  # noqa: D102 - an attribute

    @property
    @abstractmethod
    def has_masks(self) -> bool: ...  # noqa: D102 - an attribute

    @property
    @abstractmethod
    def map_rule(self) -> MapRule: ...  # noqa: D102 - an attribute

    @property
    @abstractmethod
    def short_id(self) -> str:
        """Identifies the set by what it holds."""

    @abstractmethod
    def read(self, number: int) -> RawSample:
        """The bytes of a sample.

        Raises:
            UnreadableSample: Its own files cannot be read.
            DataError: The set is gone, which no other sample can make up for.
        """

    @abstractmethod
    def notes(self, number: int) -> dict[str, Any]:
        """A sample's annotations alone, as ``parse_notes`` gives them.

        Raises:
            DataError: They are damaged.
        """

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Category names in label order."""
        return tuple(category.name for category in self.categories)

    @cached_property
    def label_of_category(self) -> dict[int, int]:
        """Label by COCO category id."""
        return {category.id: label for label, category in enumerate(self.categories)}

    def coco_ground_truth(self) -> dict[str, Any]:
        """The set as a COCO dict (``images``, ``annotations``, ``categories``).

        Raises:
            DataError: A shard is gone, or annotations are damaged.
        """
        root: dict[str, Any] = {"info": {}, "images": [], "annotations": []}
        root["categories"] = [category.model_dump() for category in self.categories]
        for number in range(len(self)):
            notes = self.notes(number)
            image = {"id": notes["image_id"], **{key: notes[key] for key in ("file_name", "height", "width")}}
            root["images"].append(image)
            root["annotations"] += [{**note, "image_id": notes["image_id"]} for note in notes["annotations"]]
        return root
