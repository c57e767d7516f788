"""A packed set: tar shards that webdataset reads, an index beside each, and one manifest that makes them a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from piip_scale.config.run import CacheConfig
from piip_scale.data.images import MAX_PIXELS
from piip_scale.data.orientation import UPRIGHT
from piip_scale.data.reading.files import json_bytes, sha256_of
from piip_scale.data.reading.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SAMPLE_COLUMNS,
    Category,
    Manifest,
    MapRule,
    ShardIndex,
    ShardInfo,
    parsed,
)
from piip_scale.data.reading.raw import RawSample, checked_masks, checksum, parse_notes
from piip_scale.data.reading.sample_set import SampleSet
from piip_scale.data.reading.set_files import LocalFiles, SetFiles, open_files
from piip_scale.data.reading.sources import NEVER, Stop, located
from piip_scale.errors import DataError
from piip_scale.registry import SetKind

# What a column stands for that an index leaves out.
_ABSENT = {"orientations": UPRIGHT, "map_orientations": UPRIGHT}


class ShardSet(SampleSet):
    """A packed set, open for reading samples by number.

    Attributes:
        location: Where it lies, as the user wrote it.
        files: Its files, and where they are read.
        manifest: What it holds.
        num_samples_of_shard: In the manifest's order; sample numbers run through the shards in that order.
        keys: Key of every sample, str (N,).
        image_ids: COCO image id of every sample, int64 (N,).
        sizes_px: Height and width of every image, int32 (N, 2).
        has_category_ids: The indexes say which classes each image has: see ``labels_of_samples``.
    """

    def __init__(self, files: SetFiles, manifest: Manifest, indexes: Sequence[ShardIndex]) -> None:
        self.files, self.location, self.manifest = files, files.location, manifest
        self.num_samples_of_shard = tuple(shard.num_samples for shard in manifest.shards)
        self.keys: Any = np.array([key for index in indexes for key in index.keys])
        self.image_ids = _column([index.image_ids for index in indexes])
        self.sizes_px = np.stack(
            [_column([getattr(index, name) for index in indexes]) for name in ("heights_px", "widths_px")], axis=1
        ).astype(np.int32)
        places = [
            [getattr(index, name) or (_ABSENT.get(name, 0),) * len(index.keys) for index in indexes]
            for name in SAMPLE_COLUMNS
        ]
        shards = np.repeat(np.arange(len(indexes)), self.num_samples_of_shard)
        self._places = np.stack([shards, *map(_column, places)], axis=1)
        self.has_category_ids = all(index.category_ids or not index.keys for index in indexes)
        self._category_ids = _flat_categories(indexes)

    @classmethod
    def open(
        cls,
        location: str | Path,
        classes: Sequence[str] = (),
        kind: SetKind | None = None,
        cache: CacheConfig = CacheConfig(),  # noqa: B008 - frozen
        max_pixels: int | None = None,
    ) -> ShardSet:
        """Opens a set and checks that it is whole: manifest, indexes and, in a folder, sizes, not every byte.

        Args:
            location: The folder it was packed to, or where it was put: see ``sources``.
            classes: The class names expected, in label order; empty takes the set's own.
            kind: The kind expected; ``None`` takes any.
            cache: Where shards that are not in a folder are kept on this node.
            max_pixels: Of the largest image; ``None`` takes the usual limit.

        Raises:
            DataError: It is absent, unfinished, damaged (naming the shard), of another kind or of other classes, or
                holds an image that is too large.
        """
        files = open_files(location, cache)
        manifest = parsed(files.manifest(), Manifest, located(files.location, MANIFEST))
        if manifest.format_version != FORMAT_VERSION:
            raise DataError(
                f"format version of the set at {location}",
                value=manifest.format_version,
                rule=f"this version reads {FORMAT_VERSION}",
                fix="pack the set again with --overwrite",
            )
        _check_wanted(manifest, files.location, classes, kind)
        shards = cls(files, manifest, _read_indexes(files, manifest.shards))
        shards.check_sizes(max_pixels or MAX_PIXELS)
        return shards

    def check(self, classes: Sequence[str], kind: SetKind | None, max_pixels: int) -> None:
        """Holds an open set to what ``open`` holds one to, of the same parameters; reads nothing.

        Raises:
            DataError: It is of another kind or of other classes, or holds an image that is too large.
        """
        _check_wanted(self.manifest, self.location, classes, kind)
        self.check_sizes(max_pixels)

    @property
    def kind(self) -> SetKind:
        """What its samples are labelled with."""
        return self.manifest.kind

    @property
    def categories(self) -> tuple[Category, ...]:
        """In label order."""
        return self.manifest.categories

    @property
    def has_masks(self) -> bool:
        """Every annotation has a segmentation."""
        return self.manifest.has_masks

    def check_sizes(self, max_pixels: int) -> None:
        """Holds all images to a limit. Decoding holds each to its size in the index, so that no file can be larger.

        Raises:
            DataError: One has more pixels.
        """
        num_pixels = self.sizes_px.astype(np.int64).prod(axis=1)
        if num_pixels.max(initial=0) > max_pixels:
            number = int(num_pixels.argmax())
            height, width = self.sizes_px[number].tolist()
            raise DataError(
                f"sample {self.keys[number]} of {self.location} is {width} x {height} px",
                rule=f"at most {max_pixels} pixels are read, since small files can be made to fill any memory",
                fix=f"if it is what you want, raise data.max_pixels (--max-pixels) to {height * width}",
            )

    @property
    def map_rule(self) -> MapRule:
        """What the pixels of a segmentation set's label maps mean."""
        return MapRule(len(self.classes), self.manifest.reduce_zero_label)

    @property
    def short_id(self) -> str:
        """Identifies the set by what its shards hold, wherever it lies: the start of a checksum."""
        held = [(shard.sha256, shard.index_sha256) for shard in self.manifest.shards]
        return sha256_of(json_bytes(held))[:12]

    def numbers_of_shard(self, shard: int) -> range:
        """The numbers of a shard's samples."""
        first = sum(self.num_samples_of_shard[:shard])
        return range(first, first + self.num_samples_of_shard[shard])

    def shard_of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The shards that samples are in, by number, int64 as ``numbers``."""
        shards: npt.NDArray[np.int64] = self._places[numbers, 0]
        return shards

    def fetch(self, shard: int, stop: Stop = NEVER) -> None:
        """Has a shard ready for reading, by its number; nothing to do for a set in a folder.

        Raises:
            DataError: It does not come.
            StoppedError: ``stop`` was set.
        """
        self.files.fetch(self.manifest.shards[shard], stop)

    def read(self, number: int) -> RawSample:
        """The bytes of a sample.

        Raises:
            DataError: Its shard is gone or cut off, which no other sample can make up for.
        """
        raw = self._raw(number)
        if not self.files.is_remote or checksum(raw.image, raw.notes, raw.label_map) == raw.crc32:
            return raw
        # Perhaps only this node's copy of the shard is damaged, and the sample is whole where it comes from. Another
        # process may have mended the copy since: it is read again whoever did.
        self.files.mend(self._shard(number))
        return self._raw(number)

    @cached_property
    def labels_of_samples(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Which classes each sample can train, as the indexes say: no annotation is read.

        Returns:
            Sample numbers, ascending, and a label beside each, int64 (L,).

        Raises:
            DataError: The set was packed without, or an index names a category that the manifest has not.
        """
        if not self.has_category_ids:
            raise DataError(
                f"the shards in {self.location} do not say which classes each image has",
                rule="data.sampling counts the images of a class, and sets packed before indexes held that lack it",
                fix="pack the set again, to another folder, or leave data.sampling out",
            )
        numbers, ids = self._category_ids
        known = np.array(sorted(self.label_of_category), np.int64)
        if len(strange := np.setdiff1d(ids, known)):
            raise DataError(
                f"an index of {self.location} names category {strange[0]}",
                rule="the manifest has none of this id",
                fix="copy it again, or pack the set again",
            )
        labels = np.array([self.label_of_category[category] for category in known.tolist()], np.int64)
        return numbers, labels[np.searchsorted(known, ids)]

    def _raw(self, number: int) -> RawSample:
        _, image_at, image_bytes, notes_at, notes_bytes, crc32, map_at, map_bytes, *shape = map(
            int, self._places[number]
        )
        ranges = ((image_at, image_bytes), (notes_at, notes_bytes), (map_at, map_bytes))
        image, notes, label_map = self.files.read(self._shard(number), ranges)
        orientation, map_orientation, height_px, width_px = shape
        return RawSample(
            str(self.keys[number]), image, notes, crc32, label_map, orientation, map_orientation, (height_px, width_px)
        )

    def label_map(self, number: int) -> bytes:
        """The file of a sample's label map alone; empty where the set has none.

        Raises:
            DataError: Its shard is gone or cut off.
        """
        offset, num_bytes = map(int, self._places[number, 6:8])
        return self.files.read(self._shard(number), [(offset, num_bytes)])[0]

    def notes(self, number: int) -> dict[str, Any]:
        """A sample's annotations alone, as ``parse_notes`` gives them: the image is not read.

        Raises:
            DataError: Its shard is gone, or the annotations are damaged.
        """
        offset, num_bytes, crc32 = map(int, self._places[number, 3:6])
        notes = self.files.read(self._shard(number), [(offset, num_bytes)])[0]
        name = str(self.keys[number])
        found = checked_masks(parse_notes(RawSample(name, b"", notes, crc32), self.manifest.kind), name)
        if problem := next(filter(None, self._strange_notes(found, int(self.image_ids[number]))), ""):
            raise DataError(f"annotations of sample {name} hold {problem}", fix="pack the set again")
        return found

    def _strange_notes(self, notes: dict[str, Any], image_id: int) -> Iterator[str]:
        """What differs from index and manifest."""
        if notes["image_id"] != image_id:
            yield f"image_id {notes['image_id']}, and the index says {image_id}"
        for annotation in notes.get("annotations", []):
            if annotation["category_id"] not in self.label_of_category:
                yield f"category {annotation['category_id']}, and the manifest has none of this id"
            if self.manifest.has_masks and "segmentation" not in annotation:
                yield f"annotation {annotation['id']} without a mask, and the manifest says that all have one"

    def _shard(self, number: int) -> ShardInfo:
        return self.manifest.shards[int(self._places[number, 0])]


def _check_wanted(manifest: Manifest, location: str, classes: Sequence[str], kind: SetKind | None) -> None:
    if kind not in (None, manifest.kind):
        raise DataError(
            f"the shards in {location} are packed for {manifest.kind}",
            rule=f"this needs a set for {kind}",
            fix=f"choose another set, or pack one for {kind}: see `piip-scale shards pack --help`",
        )
    names = [category.name for category in manifest.categories]
    if classes and list(classes) != names:
        raise DataError(
            f"classes of the shards in {location}",
            value=names,
            rule=f"the config's classes are {list(classes)}",
            fix="make them equal, in the same order",
        )


def _column(of_shards: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.array(values, np.int64) for values in of_shards])


def _flat_categories(indexes: Sequence[ShardIndex]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sample numbers and the category ids beside them."""
    rows = [row for index in indexes for row in index.category_ids]
    numbers = np.repeat(np.arange(len(rows)), np.array([len(row) for row in rows], np.int64))
    return numbers, np.array([category for row in rows for category in row], np.int64)


def read_index(folder: Path, shard: ShardInfo) -> ShardIndex:
    """The index of a shard in a folder, after checking that both are the manifest's.

    Raises:
        DataError: The shard or its index is absent, or not the one that was packed.
    """
    return _read_indexes(LocalFiles(str(folder)), [shard])[0]


def _read_indexes(files: SetFiles, shards: Sequence[ShardInfo]) -> list[ShardIndex]:
    contents = files.indexes(shards)
    return [_checked_index(*each, files.location) for each in zip(contents, shards, strict=True)]


def _checked_index(content: bytes, shard: ShardInfo, location: str) -> ShardIndex:
    name = located(location, shard.index_name)
    index = parsed(content, ShardIndex, name)
    is_same = sha256_of(content) == shard.index_sha256 and index.shard_bytes == shard.size_bytes
    if not is_same or len(index.keys) != shard.num_samples:
        raise DataError(
            f"index {name} is not the one that was packed",
            rule="its checksum must be the manifest's",
            fix="copy it again, or pack the set again",
        )
    return index
