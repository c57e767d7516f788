"""Sets as their sources have them, read without packing: the checks of packing, the samples of its shards."""

from __future__ import annotations

from typing import Any

from piip_scale.data.packing.pack_plan import Reading
from piip_scale.data.packing.pack_reading import raw_sample
from piip_scale.data.packing.packing import PackOptions, PackSource
from piip_scale.data.reading.files import json_bytes, sha256_of
from piip_scale.data.reading.manifest import Category, MapRule
from piip_scale.data.reading.raw import RawSample, UnreadableSample, checked_masks, parse_notes
from piip_scale.data.reading.sample_set import SampleSet
from piip_scale.errors import DataError
from piip_scale.registry import SetKind


class UnpackedSet(SampleSet):
    """The samples that packing a source would give, in the same order.

    Args:
        source: The source.
        how: How its files are read.
        kind: The kind expected.
        location: What messages call it.

    Raises:
        DataError: Something in the source is wrong, or it holds no images.
    """

    def __init__(self, source: PackSource, how: PackOptions, kind: SetKind, location: str) -> None:
        source.problems.settle(location)
        if not source.items:
            raise DataError(f"{location} holds no images", rule="there must be some to evaluate on")
        if source.facts.kind != kind:
            raise DataError(f"{location} is a set for {source.facts.kind}", rule=f"this needs one for {kind}")
        self.location, self._facts, self._items = location, source.facts, source.items
        self._reading: Reading = how.reading(source.facts.undecided)
        self.keys = [item.key for item in source.items]

    @property
    def kind(self) -> SetKind:
        """What its samples are labelled with."""
        return self._facts.kind

    @property
    def categories(self) -> tuple[Category, ...]:
        """In label order."""
        return self._facts.categories

    @property
    def has_masks(self) -> bool:
        """Every annotation has a segmentation."""
        return self._facts.has_masks

    @property
    def map_rule(self) -> MapRule:
        """What the pixels of a segmentation set's label maps mean."""
        return MapRule(len(self.classes), self._facts.reduce_zero_label)

    @property
    def short_id(self) -> str:
        """Identifies the set by names, sizes and annotations: the start of a checksum."""
        held = [[item.key, item.file_bytes, sha256_of(item.notes)] for item in self._items]
        return sha256_of(json_bytes(held))[:12]

    def read(self, number: int) -> RawSample:
        """The bytes of a sample.

        Raises:
            UnreadableSample: Its files cannot be read, or do not fit each other.
        """
        try:
            return raw_sample(self._items[number], self._reading)
        except DataError as error:
            raise UnreadableSample(error.line) from None

    def notes(self, number: int) -> dict[str, Any]:
        """A sample's annotations alone.

        Raises:
            DataError: A mask is none of its image.
        """
        item = self._items[number]
        raw = RawSample(item.key, b"", item.notes, 0)
        return checked_masks(parse_notes(raw, self._facts.kind), item.key)
