"""A packed set: tar shards that webdataset reads, an index beside each, and one manifest that makes them a whole."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pydantic

from piip_scale.config.base import Strict
from piip_scale.data.files import sha256_of
from piip_scale.data.label_maps import MapRule
from piip_scale.data.sample import RawSample, SetKind, parse_notes
from piip_scale.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_GLOB = "shard-*.tar"

_MAX_OPEN_SHARDS = 128
_Model = TypeVar("_Model", bound=Strict)


class Category(Strict):
    """A class, at the place of its label."""

    id: int
    name: str


class ShardInfo(Strict):
    """What the manifest says of a shard."""

    name: str
    num_samples: int
    size_bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        """File name of the index beside the shard."""
        return index_name(self.name)


class Manifest(Strict):
    """A whole set; written last, so that a set without it is unfinished.

    Attributes:
        kind: What its samples are labelled with.
        reduce_zero_label: In the label maps of a segmentation set 0 is ignored and the classes count from 1.
        categories: In label order; ids are the COCO file's, or the labels themselves.
        has_masks: Every annotation has a segmentation.
        input_sha256: Of the annotations, the images' names and sizes, and the options.
        made_with: The options and versions it was packed with.
    """

    format_version: int
    kind: SetKind = "detection"
    reduce_zero_label: bool = False
    categories: tuple[Category, ...]
    has_masks: bool
    num_samples: int
    num_annotations: int
    shards: tuple[ShardInfo, ...]
    input_sha256: str
    made_with: dict[str, Any]


class ShardIndex(Strict):
    """Where each sample of a shard lies, as columns of equal length.

    Attributes:
        plan_sha256: Of what was to be packed; a restart keeps a shard whose plan is the same.
        map_offsets: Of label maps, like ``map_bytes``; empty where there are none.
    """

    shard_bytes: int
    shard_sha256: str
    plan_sha256: str
    num_annotations: int
    keys: tuple[str, ...]
    image_ids: tuple[int, ...]
    heights_px: tuple[int, ...]
    widths_px: tuple[int, ...]
    image_offsets: tuple[int, ...]
    image_bytes: tuple[int, ...]
    notes_offsets: tuple[int, ...]
    notes_bytes: tuple[int, ...]
    crc32s: tuple[int, ...]
    map_offsets: tuple[int, ...] = ()
    map_bytes: tuple[int, ...] = ()


def shard_name(number: int) -> str:
    """File name of a set's shard."""
    return f"shard-{number:06d}.tar"


def index_name(name: str) -> str:
    """File name of the index beside a shard."""
    return f"{name.removesuffix('.tar')}.index.json"


def read_json_model(path: Path, kind: type[_Model]) -> tuple[_Model, bytes]:
    """A manifest or an index, and its bytes.

    Raises:
        DataError: The file is absent or not what it should be.
    """
    try:
        content = path.read_bytes()
        return kind.model_validate_json(content), content
    except OSError as error:
        raise DataError(
            f"{path} cannot be read", value=os.strerror(error.errno or 0), fix="pack the set again"
        ) from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{path} is damaged", value=f"{where}: {first['msg']}", fix="pack the set again with --overwrite"
        ) from None


class ShardSet:
    """A packed set, open for reading samples by number.

    Attributes:
        folder: Where it lies.
        manifest: What it holds.
        classes: Category names in label order.
        label_of_category: Label by COCO category id.
        num_samples_of_shard: In the manifest's order; sample numbers run through the shards in that order.
        keys: Key of every sample, str (N,).
        image_ids: COCO image id of every sample, int64 (N,).
        sizes_px: Height and width of every image, int32 (N, 2).
    """

    def __init__(self, folder: Path, manifest: Manifest, indexes: Sequence[ShardIndex]) -> None:
        self.folder, self.manifest = folder, manifest
        self.classes = tuple(category.name for category in manifest.categories)
        self.label_of_category = {category.id: label for label, category in enumerate(manifest.categories)}
        self.num_samples_of_shard = tuple(shard.num_samples for shard in manifest.shards)
        self.keys = np.array([key for index in indexes for key in index.keys])
        self.image_ids = np.array([i for index in indexes for i in index.image_ids], np.int64)
        self.sizes_px = np.array(
            [size for index in indexes for size in zip(index.heights_px, index.widths_px, strict=True)], np.int32
        ).reshape(-1, 2)
        self._places = np.array(
            [
                (number, *place)
                for number, index in enumerate(indexes)
                for place in zip(
                    index.image_offsets,
                    index.image_bytes,
                    index.notes_offsets,
                    index.notes_bytes,
                    index.crc32s,
                    index.map_offsets or (0,) * len(index.keys),
                    index.map_bytes or (0,) * len(index.keys),
                    strict=True,
                )
            ],
            np.int64,
        ).reshape(-1, 8)
        self._files = _ShardFiles([folder / shard.name for shard in manifest.shards])

    @classmethod
    def open(cls, folder: str | Path, classes: Sequence[str] = (), kind: SetKind | None = None) -> ShardSet:
        """Opens a set and checks that it is whole: manifest, indexes and sizes, not every byte.

        Args:
            folder: Where it was packed to.
            classes: The class names expected, in label order; empty takes the set's own.
            kind: The kind expected; ``None`` takes any.

        Raises:
            DataError: It is absent, unfinished, damaged (naming the shard), of another kind or of other classes.
        """
        folder = Path(folder)
        _require_manifest(folder)
        manifest, _ = read_json_model(folder / MANIFEST, Manifest)
        if manifest.format_version != FORMAT_VERSION:
            raise DataError(
                f"format version of {folder / MANIFEST}",
                value=manifest.format_version,
                rule=f"this version reads {FORMAT_VERSION}",
                fix="pack the set again with --overwrite",
            )
        if kind not in (None, manifest.kind):
            raise DataError(
                f"the shards in {folder} are packed for {manifest.kind}",
                rule=f"this needs a set for {kind}",
                fix=f"choose another folder, or pack a set for {kind}: see `piip-scale shards pack --help`",
            )
        names = [category.name for category in manifest.categories]
        if classes and list(classes) != names:
            raise DataError(
                f"classes of the shards in {folder}",
                value=names,
                rule=f"the config's classes are {list(classes)}",
                fix="make them equal, in the same order",
            )
        return cls(folder, manifest, [read_index(folder, shard) for shard in manifest.shards])

    def __len__(self) -> int:
        return len(self._places)

    @property
    def map_rule(self) -> MapRule:
        """What the pixels of a segmentation set's label maps mean."""
        return MapRule(len(self.classes), self.manifest.reduce_zero_label)

    def numbers_of_shard(self, shard: int) -> range:
        """The numbers of a shard's samples."""
        first = sum(self.num_samples_of_shard[:shard])
        return range(first, first + self.num_samples_of_shard[shard])

    def read(self, number: int) -> RawSample:
        """The bytes of a sample.

        Raises:
            DataError: Its shard is gone or cut off, which no other sample can make up for.
        """
        shard, image_offset, image_bytes, notes_offset, notes_bytes, crc32, *_ = map(int, self._places[number])
        image = self._files.read(shard, image_offset, image_bytes)
        notes = self._files.read(shard, notes_offset, notes_bytes)
        return RawSample(str(self.keys[number]), image, notes, crc32, self.label_map(number))

    def label_map(self, number: int) -> bytes:
        """The file of a sample's label map alone; empty where the set has none.

        Raises:
            DataError: Its shard is gone or cut off.
        """
        shard, offset, num_bytes = (int(self._places[number, column]) for column in (0, 6, 7))
        return self._files.read(shard, offset, num_bytes) if num_bytes else b""

    def notes(self, number: int) -> dict[str, Any]:
        """A sample's annotations alone, as ``parse_notes`` gives them: the image is not read.

        Raises:
            DataError: Its shard is gone, or the annotations are damaged.
        """
        shard, _, _, notes_offset, notes_bytes, crc32, *_ = map(int, self._places[number])
        notes = self._files.read(shard, notes_offset, notes_bytes)
        return parse_notes(RawSample(str(self.keys[number]), b"", notes, crc32), self.manifest.kind)

    def coco_ground_truth(self) -> dict[str, Any]:
        """The set as a COCO dict (``images``, ``annotations``, ``categories``), as packed.

        Raises:
            DataError: A shard is gone, or annotations are damaged.
        """
        root: dict[str, Any] = {"info": {}, "images": [], "annotations": []}
        root["categories"] = [category.model_dump() for category in self.manifest.categories]
        for number in range(len(self)):
            notes = self.notes(number)
            image = {"id": notes["image_id"], **{key: notes[key] for key in ("file_name", "height", "width")}}
            root["images"].append(image)
            root["annotations"] += [{**note, "image_id": notes["image_id"]} for note in notes["annotations"]]
        return root


def read_index(folder: Path, shard: ShardInfo) -> ShardIndex:
    """The index of a shard, after checking that both are the manifest's.

    Raises:
        DataError: The shard or its index is absent, or not the one that was packed.
    """
    path = folder / shard.name
    size_bytes = path.stat().st_size if path.is_file() else None
    if size_bytes != shard.size_bytes:
        raise DataError(
            f"shard {path} is {'not there' if size_bytes is None else f'{size_bytes} bytes long'}",
            rule=f"its manifest says {shard.size_bytes} bytes",
            fix="copy it again, or pack the set again",
        )
    index, content = read_json_model(folder / shard.index_name, ShardIndex)
    if sha256_of(content) != shard.index_sha256 or len(index.keys) != shard.num_samples:
        raise DataError(
            f"index {folder / shard.index_name} is not the one that was packed",
            rule="its checksum must be the manifest's",
            fix="copy it again, or pack the set again",
        )
    return index


def _require_manifest(folder: Path) -> None:
    if (folder / MANIFEST).is_file():
        return
    if not folder.is_dir():
        problem, fix = "is not there", "check the path, or pack the set with `piip-scale shards pack`"
    elif any(folder.glob(SHARD_GLOB)):
        problem, fix = "is unfinished: it has shards but no manifest", "run `piip-scale shards pack` again to finish it"
    else:
        problem, fix = "holds no shards", "pack a set with `piip-scale shards pack`"
    raise DataError(f"shard folder {folder} {problem}", fix=fix)


class _ShardFiles:
    """Open files of the shards last read; each process opens its own."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        try:
            content = os.pread(self._descriptor(shard), num_bytes, offset)
        except OSError as error:
            raise DataError(
                f"shard {self._paths[shard]} cannot be read",
                value=os.strerror(error.errno or 0),
                fix="restore it, then start again: the run resumes where it stopped",
            ) from error
        if len(content) != num_bytes:
            raise DataError(
                f"shard {self._paths[shard]} ends before byte {offset + num_bytes}",
                rule="it was cut off after it was opened",
                fix="copy it again, or pack the set again",
            )
        return content

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            self._open[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > _MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {"_paths": self._paths, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
