"""What is to be packed, decided before anything is read: samples, and which of them share a shard."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from piip_scale.data.images import MAX_PIXELS
from piip_scale.data.orientation import Exif, Undecided
from piip_scale.data.reading.files import json_bytes
from piip_scale.data.reading.manifest import FORMAT_VERSION, MapRule, shard_name


@dataclass(frozen=True, slots=True)
class LabelMap:
    """A label map to be packed beside its image.

    Attributes:
        path: The file; it is stored as it is.
        file_bytes: Its size.
        rule: What its pixels may be.
    """

    path: Path
    file_bytes: int
    rule: MapRule


@dataclass(frozen=True, slots=True)
class PackItem:
    """A sample to be packed; light, because it goes to another process.

    Attributes:
        image_id: Names the sample.
        path: The image file; it is stored as it is.
        size_px: Height and width that the image is held to; ``None`` where nothing states them: packing learns
            them, and a pass over all files only to plan is spared.
        file_bytes: Size of the image file.
        num_annotations: In the notes.
        notes: JSON: what ``parse_notes`` reads.
        label_map: Of a segmentation set.
        category_ids: That training can take from it, ascending; ``None`` where its files say so.
    """

    image_id: int
    path: Path
    size_px: tuple[int, int] | None
    file_bytes: int
    num_annotations: int
    notes: bytes
    label_map: LabelMap | None = None
    category_ids: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """Key of the sample in its shard."""
        return f"{self.image_id:012d}"


@dataclass(frozen=True)
class Reading:
    """How files are read and stored.

    Attributes:
        jpeg_quality: What images are compressed with again; ``None`` stores the files as they are.
        exif: What becomes of an orientation in a file.
        max_pixels: Images of more are refused.
        skip_broken: Samples that cannot be used are left out.
        undecided: What becomes of an orientation that no size decides, where the rest of the set shows it.
    """

    jpeg_quality: int | None = None
    exif: Exif = "auto"
    max_pixels: int = MAX_PIXELS
    skip_broken: bool = False
    undecided: Undecided | None = None

    def options(self) -> dict[str, Any]:
        """What makes another set, for the manifest; defaults are left out: sets packed before stay the same."""
        # What is undecided is turned by default, whether others show it or not.
        default = asdict(Reading()) | {"undecided": None if self.undecided is None else "apply"}
        return {key: value for key, value in asdict(self).items() if value != default[key]}


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be packed.

    Attributes:
        path: Where.
        items: Its samples, in their order.
        reading: How their files are read and stored.
        sha256: Of all that.
    """

    path: Path
    items: tuple[PackItem, ...]
    reading: Reading
    sha256: str


def plan_shards(
    samples: Iterable[PackItem],
    out: Path,
    *,
    target_bytes: float,
    target_samples: int | None,
    reading: Reading,
) -> Iterator[ShardPlan]:
    """Cuts samples into shards, by the sizes of their files as they are; at least one shard.

    Args:
        samples: In the order of the set.
        out: Folder of the shards.
        target_bytes: Most bytes of a shard of more than one sample.
        target_samples: Most samples of a shard.
        reading: As in ``ShardPlan``.
    """
    items: list[PackItem] = []
    num_bytes = 0
    number = 0
    for item in samples:
        # Each tar member has a header block and up to a block of padding.
        size = item.file_bytes + len(item.notes) + 4 * tarfile.BLOCKSIZE
        if item.label_map is not None:
            size += item.label_map.file_bytes + 2 * tarfile.BLOCKSIZE
        if items and (num_bytes + size > target_bytes or len(items) == target_samples):
            yield _shard_plan(out / shard_name(number), items, reading)
            items, num_bytes, number = [], 0, number + 1
        items.append(item)
        num_bytes += size
    yield _shard_plan(out / shard_name(number), items, reading)


def _shard_plan(path: Path, items: Sequence[PackItem], reading: Reading) -> ShardPlan:
    digest = hashlib.sha256(f"{FORMAT_VERSION} {path.name}".encode())
    if options := reading.options():
        digest.update(json_bytes(options))
    for item in items:
        digest.update(json_bytes([item.key, item.file_bytes]) + item.notes)
        if (label_map := item.label_map) is not None:
            digest.update(json_bytes([label_map.path.name, label_map.file_bytes, asdict(label_map.rule)]))
    return ShardPlan(path, tuple(items), reading, digest.hexdigest())
