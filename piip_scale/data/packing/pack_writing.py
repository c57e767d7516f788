"""Planned shards to files: each is whole or absent, and has its index beside it."""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from piip_scale.data.images import Image
from piip_scale.data.orientation import UPRIGHT
from piip_scale.data.packing.pack_plan import PackItem, ShardPlan
from piip_scale.data.packing.pack_reading import Checked, add_pixels, checked_sample
from piip_scale.data.reading.files import HashingWriter, sha256_of, whole_file, write_bytes
from piip_scale.data.reading.manifest import SAMPLE_COLUMNS, ShardIndex, ShardInfo, index_name, read_json_model
from piip_scale.data.reading.raw import checksum
from piip_scale.errors import DataError

_SUFFIX = re.compile(r"\.[a-z0-9]{1,8}")


@dataclass(frozen=True)
class PackedShard:
    """What came of a plan.

    Attributes:
        info: For the manifest; ``None`` where the shard was not written.
        num_annotations: In the samples that it holds.
        num_turned: Images that are turned as their EXIF data say.
        pixels_of_class: Of a segmentation set, in label order, those of no class last.
        broken: Samples that are not in it, and why.
        flaws: What could be overlooked in images, a line each.
    """

    info: ShardInfo | None
    num_annotations: int = 0
    num_turned: int = 0
    pixels_of_class: tuple[int, ...] = ()
    broken: tuple[tuple[PackItem, DataError], ...] = ()
    flaws: tuple[str, ...] = ()


def finished_or_written(plan: ShardPlan, advance: Callable[[int], None] | None = None) -> PackedShard:
    """Packs a shard, unless an earlier run finished it; one with broken samples only where they are skipped.

    Args:
        plan: The shard.
        advance: Is given the number of samples after each, or after all that were there.

    Raises:
        DataError: The shard cannot be written.
    """
    index_path = plan.path.with_name(index_name(plan.path.name))
    with contextlib.suppress(DataError, FileNotFoundError):
        index, content = read_json_model(index_path, ShardIndex)
        if index.plan_sha256 == plan.sha256 and plan.path.stat().st_size == index.shard_bytes:
            if advance is not None:
                advance(len(plan.items))
            return _finished(plan, index, content)
    # In this order, as when they are written the other way round.
    plan.path.unlink(missing_ok=True)
    index_path.unlink(missing_ok=True)
    return _write_shard(plan, index_path, advance)


def checked_only(plan: ShardPlan, advance: Callable[[int], None] | None = None) -> PackedShard:
    """Looks at a shard's samples and writes nothing: what else is wrong with an input that will not be packed."""
    broken = []
    for item in plan.items:
        try:
            checked_sample(item, plan.reading)
        except DataError as error:
            broken.append((item, error))
        if advance is not None:
            advance(1)
    return PackedShard(None, broken=tuple(broken))


def _finished(plan: ShardPlan, index: ShardIndex, index_content: bytes) -> PackedShard:
    """A shard of an earlier run; of samples that it lacks is found out again why."""
    keys = set(index.keys)
    missing = tuple(item for item in plan.items if item.key not in keys)
    broken = checked_only(ShardPlan(plan.path, missing, plan.reading, "")).broken
    return _packed(plan, index, index_content, broken)


def _packed(
    plan: ShardPlan,
    index: ShardIndex,
    index_content: bytes,
    broken: tuple[tuple[PackItem, DataError], ...],
    flaws: tuple[str, ...] = (),
) -> PackedShard:
    info = ShardInfo(
        name=plan.path.name,
        num_samples=len(index.keys),
        size_bytes=index.shard_bytes,
        sha256=index.shard_sha256,
        index_sha256=sha256_of(index_content),
    )
    num_turned = sum(orientation != UPRIGHT for orientation in index.orientations)
    return PackedShard(info, index.num_annotations, num_turned, index.pixels_of_class, broken, flaws)


class _Broken(Exception):
    """Ends the writing of a shard that is not to be kept."""


def _write_shard(plan: ShardPlan, index_path: Path, advance: Callable[[int], None] | None) -> PackedShard:
    writer = _ShardWriter(plan, advance)
    with contextlib.suppress(_Broken):
        with whole_file(plan.path) as file:
            index = writer.write(file)
            index_content = index.model_dump_json(exclude_defaults=True).encode()
            # Before the shard takes its name: one without an index is none of ours, whenever this is killed.
            write_bytes(index_path, index_content)
        return _packed(plan, index, index_content, tuple(writer.broken), tuple(writer.flaws))
    return PackedShard(None, broken=tuple(writer.broken), flaws=tuple(writer.flaws))


class _ShardWriter:
    """Writes the samples of one shard."""

    def __init__(self, plan: ShardPlan, advance: Callable[[int], None] | None) -> None:
        self._plan, self._advance = plan, advance
        self._columns: dict[str, list[int]] = {name: [] for name in SAMPLE_COLUMNS}
        self._items: list[PackItem] = []
        self._pixels: list[int] = []
        self.broken: list[tuple[PackItem, DataError]] = []
        self.flaws: list[str] = []

    def write(self, file: BinaryIO) -> ShardIndex:
        """Writes all samples that can be used; returns the index.

        Raises:
            _Broken: One is broken and not to be skipped, or none is left.
        """
        writer = HashingWriter(file)
        with tarfile.open(fileobj=writer, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for item in self._plan.items:
                self._add(tar, item)
                if self._advance is not None:
                    self._advance(1)
        if not self._items or (self.broken and not self._plan.reading.skip_broken):
            raise _Broken
        return self._index(writer)

    def _add(self, tar: tarfile.TarFile, item: PackItem) -> None:
        try:
            checked = checked_sample(item, self._plan.reading)
        except DataError as error:
            self.broken.append((item, error))
            return
        if self.broken and not self._plan.reading.skip_broken:
            return
        for name, value in _add_sample(tar, item, checked, self._plan.reading.jpeg_quality).items():
            self._columns[name].append(value)
        self._items.append(item)
        self._pixels = add_pixels(self._pixels, checked.pixels_of_class)
        self.flaws += checked.flaws

    def _index(self, writer: HashingWriter) -> ShardIndex:
        # Columns that a set has no use for are left out: its index is what it was before there were any.
        for name in ("orientations", "map_orientations"):
            if all(value == UPRIGHT for value in self._columns[name]):
                self._columns[name] = []
        return ShardIndex(
            shard_bytes=writer.num_bytes,
            shard_sha256=writer.sha256,
            plan_sha256=self._plan.sha256,
            num_annotations=sum(item.num_annotations for item in self._items),
            keys=tuple(item.key for item in self._items),
            image_ids=tuple(item.image_id for item in self._items),
            category_ids=tuple(item.category_ids for item in self._items if item.category_ids is not None),
            pixels_of_class=tuple(self._pixels),
            **{name: tuple(column) for name, column in self._columns.items()},
        )


def _add_sample(tar: tarfile.TarFile, item: PackItem, checked: Checked, jpeg_quality: int | None) -> dict[str, int]:
    """Appends a sample's members; returns its entries in the columns of the index."""
    content, orientation, suffix = checked.content, checked.orientation, member_suffix(item.path)
    if jpeg_quality is not None:
        smaller, suffix = smaller_image(content, suffix, checked.pixels, jpeg_quality)
        # What is compressed again is compressed as it is seen.
        orientation = orientation if smaller is content else UPRIGHT
        content = smaller
    entries = {
        "heights_px": checked.pixels.shape[0],
        "widths_px": checked.pixels.shape[1],
        "orientations": orientation,
        "image_offsets": _add(tar, item.key + suffix, content),
        "image_bytes": len(content),
        "notes_offsets": _add(tar, f"{item.key}.json", item.notes),
        "notes_bytes": len(item.notes),
    }
    if item.label_map is None:
        return entries | {"crc32s": checksum(content, item.notes)}
    label_map = checked.label_map
    entries |= {"map_offsets": _add(tar, f"{item.key}.seg.png", label_map), "map_bytes": len(label_map)}
    return entries | {
        "map_orientations": checked.map_orientation,
        "crc32s": checksum(content, item.notes, label_map),
    }


def member_suffix(path: Path) -> str:
    """An image's ending in its shard: readers part members by endings, and headers hold 100 characters."""
    suffix = path.suffix.lower()
    return suffix if _SUFFIX.fullmatch(suffix) and suffix not in (".json", ".seg") else ".img"


def smaller_image(content: bytes, suffix: str, pixels: Image, jpeg_quality: int) -> tuple[bytes, str]:
    """An image file compressed again, and its ending; the file as it is where that would not be smaller.

    Args:
        content: The file.
        suffix: Its ending.
        pixels: What it decodes to, RGB, uint8 (H, W, 3).
        jpeg_quality: 1 to 100.
    """
    import simplejpeg

    encoded = simplejpeg.encode_jpeg(pixels, quality=jpeg_quality, colorspace="RGB", colorsubsampling="420")
    return (encoded, ".jpg") if len(encoded) < len(content) else (content, suffix)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Appends a member whose header depends on its name and size alone; returns the offset of its content."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    header.mode = 0o644
    source: BinaryIO = io.BytesIO(content)
    offset = int(tar.offset) + tarfile.BLOCKSIZE  # type: ignore[attr-defined]
    tar.addfile(header, source)
    return offset
