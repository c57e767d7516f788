"""The manifest and the indexes of a packed set: what they hold, and the checks that each must pass.

They may come from a server, and their words become paths, commands and offsets: every field has a rule, and what breaks
one is no set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import AfterValidator, Field
from typing_extensions import Self

from piip_scale.config.base import Strict
from piip_scale.data.reading.files import read_whole
from piip_scale.data.reading.sources import is_remote
from piip_scale.data.reading.targets import Targets
from piip_scale.errors import DataError
from piip_scale.registry import SetKind
from piip_scale.text import is_unseen

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_GLOB = "shard-*.tar"

MAX_NAME_LETTERS = 500
_MAX_INT = 2**63 - 1
# Of sums of two of them, which must be whole numbers of 64 bits too: 4 EiB.
_MAX_BYTES = 2**62

_Model = TypeVar("_Model", bound=Strict)


def unshowable(text: str) -> str:
    """The first character of a name that no line can show; empty where there is none."""
    return next(filter(is_unseen, text), "")


def _showable(text: str) -> str:
    if char := unshowable(text):
        raise ValueError(f"it holds the character {char!a}, which no line can show")
    return text


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LETTERS), AfterValidator(_showable)]
"""Text for people: of one line, without control characters."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
ShardName = Annotated[str, Field(pattern=r"^shard-[0-9]{6,12}\.tar$")]
_Count = Annotated[int, Field(ge=0, le=_MAX_INT)]
CategoryId = Annotated[int, Field(ge=-_MAX_INT, le=_MAX_INT)]
_Bytes = Annotated[int, Field(ge=0, le=_MAX_BYTES)]
_SidePx = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Crc32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
# Those that an index may leave out.
_LATER_COLUMNS = frozenset({"map_offsets", "map_bytes", "orientations", "map_orientations", "category_ids"})
_Orientation = Annotated[int, Field(ge=1, le=8)]


@dataclass(frozen=True)
class MapRule:
    """What the pixels of a set's label maps mean.

    Attributes:
        num_classes: Of the set.
        reduce_zero_label: 0 is ignored and the classes count from 1, as in ADE20K.
    """

    num_classes: int
    reduce_zero_label: bool


class Category(Strict):
    """A class, at the place of its label."""

    id: CategoryId
    name: Name


class ShardInfo(Strict):
    """The manifest's entry of a shard."""

    name: ShardName
    num_samples: _Count
    size_bytes: _Bytes
    sha256: Sha256
    index_sha256: Sha256

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
        targets: What there is to train on; ``None`` in sets packed before it was counted.
        input_sha256: Of the annotations, the images' names and sizes, and the options.
        made_with: The options and versions it was packed with.
    """

    format_version: int
    kind: SetKind = "detection"
    reduce_zero_label: bool = False
    categories: tuple[Category, ...]
    has_masks: bool
    num_samples: _Count
    num_annotations: _Count
    targets: Targets | None = None
    shards: Annotated[tuple[ShardInfo, ...], Field(min_length=1)]
    input_sha256: str
    made_with: dict[str, Any]

    @pydantic.model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.num_samples != sum(shard.num_samples for shard in self.shards):
            raise ValueError(f"{self.num_samples} samples, and its shards hold another number")
        if self.targets is not None and len(self.targets.trainable) != len(self.categories):
            raise ValueError(f"targets of {len(self.targets.trainable)} classes for {len(self.categories)}")
        for what, names in (
            ("shards", [shard.name for shard in self.shards]),
            ("class names", [category.name for category in self.categories]),
            ("class ids", [category.id for category in self.categories]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"two {what} are the same")
        return self


SAMPLE_COLUMNS = (
    "image_offsets",
    "image_bytes",
    "notes_offsets",
    "notes_bytes",
    "crc32s",
    "map_offsets",
    "map_bytes",
    "orientations",
    "map_orientations",
    "heights_px",
    "widths_px",
)
"""Columns of ``ShardIndex`` that locate a sample and hold how it is turned, in the order that readers take them."""


class ShardIndex(Strict):
    """Where each sample of a shard lies, as columns of equal length.

    Attributes:
        plan_sha256: Of what was to be packed; a restart keeps a shard whose plan is the same.
        heights_px: Of the images as they are decoded, turned where ``orientations`` say so; like ``widths_px``.
        map_offsets: Of label maps, like ``map_bytes``; empty where there are none.
        orientations: EXIF's number of how each image is turned once it is decoded; empty where none is.
        map_orientations: Likewise of label maps.
        category_ids: Of each sample, those that training can take from it, ascending; empty in sets of label maps, and
            in those packed before it was written.
        pixels_of_class: Of all label maps, in label order, those of no class last; empty where there are none.
    """

    shard_bytes: _Bytes
    shard_sha256: Sha256
    plan_sha256: Sha256
    num_annotations: _Count
    keys: tuple[Name, ...]
    image_ids: tuple[_Count, ...]
    heights_px: tuple[_SidePx, ...]
    widths_px: tuple[_SidePx, ...]
    image_offsets: tuple[_Bytes, ...]
    image_bytes: tuple[_Bytes, ...]
    notes_offsets: tuple[_Bytes, ...]
    notes_bytes: tuple[_Bytes, ...]
    crc32s: tuple[_Crc32, ...]
    map_offsets: tuple[_Bytes, ...] = ()
    map_bytes: tuple[_Bytes, ...] = ()
    orientations: tuple[_Orientation, ...] = ()
    map_orientations: tuple[_Orientation, ...] = ()
    category_ids: tuple[tuple[CategoryId, ...], ...] = ()
    pixels_of_class: tuple[_Count, ...] = ()

    @pydantic.model_validator(mode="after")
    def _lies_inside_its_shard(self) -> Self:
        columns = {name: value for name, value in self if isinstance(value, tuple) and name != "pixels_of_class"}
        for name, column in columns.items():
            # Only columns that have a default may be left out.
            if len(column) != len(self.keys) and (column or name not in _LATER_COLUMNS):
                raise ValueError(f"{name} has {len(column)} entries for {len(self.keys)} samples")
        for what in ("image", "notes", "map"):
            ends = map(sum, zip(columns[f"{what}_offsets"], columns[f"{what}_bytes"], strict=True))
            if (end := max(ends, default=0)) > self.shard_bytes:
                raise ValueError(f"{what}_offsets reach to byte {end} of a shard of {self.shard_bytes}")
        return self


def shard_name(number: int) -> str:
    """File name of a set's shard."""
    return f"shard-{number:06d}.tar"


def index_name(name: str) -> str:
    """File name of the index beside a shard."""
    return f"{name.removesuffix('.tar')}.index.json"


def read_json_model(path: Path, kind: type[_Model]) -> tuple[_Model, bytes]:
    """A manifest or an index in a folder, and its bytes.

    Raises:
        DataError: The file is absent or not what it should be.
    """
    content = read_whole(path)
    return parsed(content, kind, str(path)), content


def parsed(content: bytes, kind: type[_Model], name: str) -> _Model:
    """A manifest or an index.

    Args:
        content: The file.
        kind: What it is to be.
        name: What errors call it.

    Raises:
        DataError: It is not what it should be.
    """
    try:
        return kind.model_validate_json(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{name} is damaged",
            value=f"{where}: {first['msg']}",
            fix="check what is there (curl needs -f)" if is_remote(name) else "pack the set again with --overwrite",
        ) from None
