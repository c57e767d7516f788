"""Samples to shards: parallel, restartable, the same bytes for the same input.

A shard is written aside and renamed, its index after it, the manifest last; whatever is killed in between, a set with
a manifest is whole, and packing again keeps the shards that are.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import piip_scale
from piip_scale.data.files import HashingWriter, json_bytes, sha256_of, whole_file, write_bytes
from piip_scale.data.label_maps import MapRule, decode_label_map
from piip_scale.data.pool import map_in_processes, num_processes
from piip_scale.data.sample import SetKind, check_size, checksum, decode_image
from piip_scale.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    SHARD_GLOB,
    Category,
    Manifest,
    ShardIndex,
    ShardInfo,
    index_name,
    read_index,
    read_json_model,
    shard_name,
)
from piip_scale.errors import DataError
from piip_scale.logging import get_logger

Progress = Callable[[int, int], None]
"""Called with the number of images packed so far and of all."""

_MEGABYTE = 1_000_000
_COLUMNS = (
    "heights_px",
    "widths_px",
    "image_offsets",
    "image_bytes",
    "notes_offsets",
    "notes_bytes",
    "crc32s",
    "map_offsets",
    "map_bytes",
)


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
        check_notes: A function of a module, called with notes and the image's name: raises a ``DataError`` for what
            takes too long to check while planning.
        label_map: Of a segmentation set.
    """

    image_id: int
    path: Path
    size_px: tuple[int, int] | None
    file_bytes: int
    num_annotations: int
    notes: bytes
    check_notes: Callable[[bytes, str], None] | None = None
    label_map: LabelMap | None = None

    @property
    def key(self) -> str:
        """Key of the sample in its shard."""
        return f"{self.image_id:012d}"


@dataclass(frozen=True)
class _Plan:
    """A shard to be packed, decided before anything is read."""

    path: Path
    items: tuple[PackItem, ...]
    sha256: str


@dataclass(frozen=True)
class SetFacts:
    """What the manifest says of a set beside its samples.

    Attributes:
        kind: What its samples are labelled with.
        categories: In label order.
        has_masks: Every annotation has a segmentation.
        options: What the user asked for; another choice makes another set.
        source: Where it comes from, for people.
        reduce_zero_label: As in ``Manifest``.
    """

    kind: SetKind
    categories: tuple[Category, ...]
    has_masks: bool
    options: dict[str, Any]
    source: dict[str, Any]
    reduce_zero_label: bool = False


@dataclass(frozen=True)
class PackOptions:
    """How shards are written.

    Attributes:
        target_mb: Size of a shard, in millions of bytes.
        target_samples: Most samples in a shard.
        workers: Processes; all cores where ``None``.
        overwrite: Replace a set of another input.
        on_progress: Told after every image (one process) or shard (several).

    Raises:
        DataError: A shard that can hold nothing.
    """

    target_mb: float = 256.0
    target_samples: int | None = None
    workers: int | None = None
    overwrite: bool = False
    on_progress: Progress | None = None

    def __post_init__(self) -> None:
        if not self.target_mb > 0 or (self.target_samples is not None and self.target_samples < 1):
            value = (self.target_mb, self.target_samples)
            raise DataError("target size of a shard", value=value, rule="it must be above 0")


def pack_items(items: Iterable[PackItem], out: Path, facts: SetFacts, how: PackOptions) -> Manifest:
    """Writes a set; a complete one of the same input in ``out`` is reused, an unfinished one is finished.

    Every image is decoded once to know that it is whole.

    Raises:
        DataError: An image or annotation is damaged, ``out`` holds another set, or it cannot be written.
    """
    plans = list(_plan(items, out, how.target_mb * _MEGABYTE, how.target_samples))
    options = {"target_mb": float(how.target_mb), "target_samples": how.target_samples} | facts.options
    categories = [category.model_dump() for category in facts.categories]
    packed = [FORMAT_VERSION, options, categories, facts.has_masks, [plan.sha256 for plan in plans]]
    input_sha256 = sha256_of(json_bytes(packed))
    if (manifest := _complete_set(out, input_sha256, how.overwrite)) is not None:
        return manifest
    _prepare(out)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        kind=facts.kind,
        reduce_zero_label=facts.reduce_zero_label,
        categories=facts.categories,
        has_masks=facts.has_masks,
        num_samples=sum(len(plan.items) for plan in plans),
        num_annotations=sum(item.num_annotations for plan in plans for item in plan.items),
        shards=_write_shards(plans, how.workers, how.on_progress),
        input_sha256=input_sha256,
        made_with={**options, **facts.source, "piip_scale": piip_scale.__version__},
    )
    _remove_other_shards(out, plans)
    write_bytes(out / MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest


def _plan(samples: Iterable[PackItem], out: Path, target_bytes: float, target_samples: int | None) -> Iterator[_Plan]:
    items: list[PackItem] = []
    num_bytes = 0
    number = 0
    for item in samples:
        # Each tar member has a header block and up to a block of padding.
        size = item.file_bytes + len(item.notes) + 4 * tarfile.BLOCKSIZE
        if item.label_map is not None:
            size += item.label_map.file_bytes + 2 * tarfile.BLOCKSIZE
        if items and (num_bytes + size > target_bytes or len(items) == target_samples):
            yield _shard_plan(out / shard_name(number), items)
            items, num_bytes, number = [], 0, number + 1
        items.append(item)
        num_bytes += size
    yield _shard_plan(out / shard_name(number), items)


def _shard_plan(path: Path, items: Sequence[PackItem]) -> _Plan:
    digest = hashlib.sha256(f"{FORMAT_VERSION} {path.name}".encode())
    for item in items:
        digest.update(json_bytes([item.key, item.file_bytes]) + item.notes)
        if (label_map := item.label_map) is not None:
            digest.update(json_bytes([label_map.path.name, label_map.file_bytes, asdict(label_map.rule)]))
    return _Plan(path, tuple(items), digest.hexdigest())


def _complete_set(out: Path, input_sha256: str, overwrite: bool) -> Manifest | None:
    """The set in ``out`` where it is whole and of this input; ``None`` where packing has to go on."""
    if not (out / MANIFEST).is_file():
        return None
    try:
        manifest, _ = read_json_model(out / MANIFEST, Manifest)
        same = manifest.input_sha256 == input_sha256
    except DataError:
        same = False
    if not same and not overwrite:
        raise DataError(
            f"{out} holds a set packed from another input or with other options",
            rule="a set is never replaced without being asked",
            fix="choose another folder, or replace it with --overwrite",
        )
    if not same:
        return None
    try:
        for shard in manifest.shards:
            read_index(out, shard)
    except DataError as error:
        get_logger(__name__).warning("%s; packing it again", error)
        return None
    return manifest


def _prepare(out: Path) -> None:
    foreign = [path for path in out.glob(SHARD_GLOB) if not path.with_name(index_name(path.name)).exists()]
    if foreign:
        raise DataError(
            f"{out} holds {foreign[0].name} without an index",
            rule="it was not written by this command, which would replace it",
            fix="choose another folder",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MANIFEST).unlink(missing_ok=True)
        for part in out.glob(".*.part"):
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write to {out}", value=os.strerror(error.errno or 0), fix="choose another folder"
        ) from error


def _remove_other_shards(out: Path, plans: Sequence[_Plan]) -> None:
    kept = {plan.path for plan in plans}
    for path in out.glob(SHARD_GLOB):
        if path not in kept:
            path.unlink()
            path.with_name(index_name(path.name)).unlink(missing_ok=True)


def _write_shards(plans: Sequence[_Plan], workers: int | None, on_progress: Progress | None) -> tuple[ShardInfo, ...]:
    total = sum(len(plan.items) for plan in plans)
    num_done = 0

    def advance(num_images: int) -> None:
        nonlocal num_done
        num_done += num_images
        if on_progress is not None:
            on_progress(num_done, total)

    num_workers = num_processes(workers, len(plans))
    if num_workers == 1:
        return tuple(_finished_or_written(plan, advance) for plan in plans)
    return tuple(map_in_processes(_finished_or_written, plans, num_workers, lambda plan: advance(len(plan.items))))


def _finished_or_written(plan: _Plan, advance: Callable[[int], None] | None = None) -> ShardInfo:
    """Packs a shard, unless an earlier run finished it."""
    index_path = plan.path.with_name(index_name(plan.path.name))
    with contextlib.suppress(DataError, FileNotFoundError):
        index, content = read_json_model(index_path, ShardIndex)
        if index.plan_sha256 == plan.sha256 and plan.path.stat().st_size == index.shard_bytes:
            if advance is not None:
                advance(len(plan.items))
            return _info(plan, index, content)
    # In this order, so that a shard without an index is never one of ours.
    plan.path.unlink(missing_ok=True)
    index_path.unlink(missing_ok=True)
    return _write_shard(plan, index_path, advance)


def _info(plan: _Plan, index: ShardIndex, index_content: bytes) -> ShardInfo:
    return ShardInfo(
        name=plan.path.name,
        num_samples=len(index.keys),
        size_bytes=index.shard_bytes,
        sha256=index.shard_sha256,
        index_sha256=sha256_of(index_content),
    )


def _write_shard(plan: _Plan, index_path: Path, advance: Callable[[int], None] | None) -> ShardInfo:
    columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}
    with whole_file(plan.path) as file:
        writer = HashingWriter(file)
        with tarfile.open(fileobj=writer, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for item in plan.items:
                for name, value in _add_sample(tar, item).items():
                    columns[name].append(value)
                if advance is not None:
                    advance(1)
        index = ShardIndex(
            shard_bytes=writer.num_bytes,
            shard_sha256=writer.sha256,
            plan_sha256=plan.sha256,
            num_annotations=sum(item.num_annotations for item in plan.items),
            keys=tuple(item.key for item in plan.items),
            image_ids=tuple(item.image_id for item in plan.items),
            **{name: tuple(column) for name, column in columns.items()},
        )
        # Columns that a set has no use for are left out: its index is what it was before there were any.
        index_content = index.model_dump_json(exclude_defaults=True).encode()
        write_bytes(index_path, index_content)
    return _info(plan, index, index_content)


def _add_sample(tar: tarfile.TarFile, item: PackItem) -> dict[str, int]:
    """Appends a sample's members; returns its entries in the columns of the index."""
    content, size_px = _checked_image(item)
    suffix = item.path.suffix.lower() or ".img"
    entries = {
        "heights_px": size_px[0],
        "widths_px": size_px[1],
        "image_offsets": _add(tar, item.key + suffix, content),
        "image_bytes": len(content),
        "notes_offsets": _add(tar, f"{item.key}.json", item.notes),
        "notes_bytes": len(item.notes),
    }
    if item.label_map is None:
        return entries | {"crc32s": checksum(content, item.notes)}
    label_map = _checked_map(item, item.label_map, size_px)
    entries |= {"map_offsets": _add(tar, f"{item.key}.seg.png", label_map), "map_bytes": len(label_map)}
    return entries | {"crc32s": checksum(content, item.notes, label_map)}


def _checked_image(item: PackItem) -> tuple[bytes, tuple[int, int]]:
    """An image's file, and its height and width."""
    name = f"{item.image_id} ({item.path})"
    content = _read(item.path, f"image {name}")
    pixels = decode_image(content, name)
    if item.size_px is not None:
        check_size(pixels, *item.size_px, name)
    if item.check_notes is not None:
        item.check_notes(item.notes, name)
    return content, (pixels.shape[0], pixels.shape[1])


def _checked_map(item: PackItem, label_map: LabelMap, size_px: tuple[int, int]) -> bytes:
    """A label map's file, of the size of its image."""
    name = f"{item.image_id} ({label_map.path})"
    content = _read(label_map.path, f"label map {name}")
    labels = decode_label_map(content, label_map.rule, name)
    if labels.shape != size_px:
        raise DataError(
            f"label map {name} is {labels.shape[1]} x {labels.shape[0]} px",
            rule=f"its image is {size_px[1]} x {size_px[0]}",
        )
    return content


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{name} cannot be read", value=os.strerror(error.errno or 0)) from error


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Appends a member whose header depends on its name and size alone; returns the offset of its content."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    header.mode = 0o644
    source: BinaryIO = io.BytesIO(content)
    offset = int(tar.offset) + tarfile.BLOCKSIZE  # type: ignore[attr-defined]
    tar.addfile(header, source)
    return offset
