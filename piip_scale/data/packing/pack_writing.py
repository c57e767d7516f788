"""Planned shards to files: each is whole or absent, and has its index beside it."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from piip_scale.data.packing.label_maps import decode_label_map
from piip_scale.data.packing.pack_plan import LabelMap, PackItem, ShardPlan
from piip_scale.data.reading.files import HashingWriter, sha256_of, whole_file, write_bytes
from piip_scale.data.reading.shards import ShardIndex, ShardInfo, index_name, read_json_model
from piip_scale.data.sample import Image, check_size, checksum, decode_image
from piip_scale.errors import DataError

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


def finished_or_written(plan: ShardPlan, advance: Callable[[int], None] | None = None) -> ShardInfo:
    """Packs a shard, unless an earlier run finished it.

    Args:
        plan: The shard.
        advance: Told the number of samples after each, or after all that were there.

    Raises:
        DataError: A sample is damaged, or the shard cannot be written.
    """
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


def _info(plan: ShardPlan, index: ShardIndex, index_content: bytes) -> ShardInfo:
    return ShardInfo(
        name=plan.path.name,
        num_samples=len(index.keys),
        size_bytes=index.shard_bytes,
        sha256=index.shard_sha256,
        index_sha256=sha256_of(index_content),
    )


def _write_shard(plan: ShardPlan, index_path: Path, advance: Callable[[int], None] | None) -> ShardInfo:
    columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}
    with whole_file(plan.path) as file:
        writer = HashingWriter(file)
        with tarfile.open(fileobj=writer, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for item in plan.items:
                for name, value in _add_sample(tar, item, plan.jpeg_quality).items():
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


def _add_sample(tar: tarfile.TarFile, item: PackItem, jpeg_quality: int | None) -> dict[str, int]:
    """Appends a sample's members; returns its entries in the columns of the index."""
    content, pixels = _checked_image(item)
    size_px = (pixels.shape[0], pixels.shape[1])
    suffix = item.path.suffix.lower() or ".img"
    if jpeg_quality is not None:
        content, suffix = smaller_image(content, suffix, pixels, jpeg_quality)
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


def _checked_image(item: PackItem) -> tuple[bytes, Image]:
    """An image's file, and what it decodes to."""
    name = f"{item.image_id} ({item.path})"
    content = _read(item.path, f"image {name}")
    pixels = decode_image(content, name)
    if item.size_px is not None:
        check_size(pixels, *item.size_px, name)
    if item.check_notes is not None:
        item.check_notes(item.notes, name)
    return content, pixels


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
