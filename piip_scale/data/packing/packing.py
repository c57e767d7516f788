"""Samples to shards: parallel, restartable, the same bytes for the same input.

A shard is written aside and renamed, its index after it, the manifest last; whatever is killed in between, a set with
a manifest is whole, and packing again keeps the shards that are.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import piip_scale
from piip_scale.data.packing.pack_plan import PackItem, ShardPlan, plan_shards
from piip_scale.data.packing.pack_writing import finished_or_written
from piip_scale.data.reading.files import json_bytes, sha256_of, write_bytes
from piip_scale.data.reading.pool import map_in_processes, num_processes
from piip_scale.data.reading.shards import (
    FORMAT_VERSION,
    MANIFEST,
    SHARD_GLOB,
    Category,
    Manifest,
    ShardInfo,
    index_name,
    read_index,
    read_json_model,
)
from piip_scale.data.sample import SetKind
from piip_scale.errors import DataError
from piip_scale.logging import get_logger

Progress = Callable[[int, int], None]
"""Called with the number of images packed so far and of all."""

_MEGABYTE = 1_000_000
_LOCK = ".packing.lock"


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
        jpeg_quality: Compress images again with it, 1 to 100, where that makes them smaller; ``None`` stores the
            files as they are.

    Raises:
        DataError: A shard that can hold nothing, or a quality that is none.
    """

    target_mb: float = 256.0
    target_samples: int | None = None
    workers: int | None = None
    overwrite: bool = False
    on_progress: Progress | None = None
    jpeg_quality: int | None = None

    def __post_init__(self) -> None:
        if not self.target_mb > 0 or (self.target_samples is not None and self.target_samples < 1):
            value = (self.target_mb, self.target_samples)
            raise DataError("target size of a shard", value=value, rule="it must be above 0")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise DataError("JPEG quality", value=self.jpeg_quality, rule="it is 1 to 100")

    def told(self) -> dict[str, Any]:
        """What of it makes another set, for the manifest."""
        told: dict[str, Any] = {"target_mb": float(self.target_mb), "target_samples": self.target_samples}
        # Left out where it is not used: sets packed before there was the choice stay the same.
        return told if self.jpeg_quality is None else told | {"jpeg_quality": self.jpeg_quality}


def pack_items(items: Iterable[PackItem], out: Path, facts: SetFacts, how: PackOptions) -> Manifest:
    """Writes a set; a complete one of the same input in ``out`` is reused, an unfinished one is finished.

    Every image is decoded once to know that it is whole.

    Raises:
        DataError: An image or annotation is damaged, ``out`` holds another set, or it cannot be written.
    """
    plans = list(
        plan_shards(
            items,
            out,
            target_bytes=how.target_mb * _MEGABYTE,
            target_samples=how.target_samples,
            jpeg_quality=how.jpeg_quality,
        )
    )
    options = how.told() | facts.options
    categories = [category.model_dump() for category in facts.categories]
    packed = [FORMAT_VERSION, options, categories, facts.has_masks, [plan.sha256 for plan in plans]]
    input_sha256 = sha256_of(json_bytes(packed))
    if (manifest := _complete_set(out, input_sha256, how.overwrite)) is not None:
        return manifest
    with _alone(out):
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


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keeps other packers out of the folder, until this process leaves it or ends."""
    path = out / _LOCK
    with _writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        file = open(path, "wb")  # noqa: SIM115 - held while the shards are written
    with file:
        try:
            # Of this process alone: a lock that its workers inherit would outlive it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process packs into {out}", fix="wait for it, or choose another folder") from None
        except OSError as error:
            get_logger(__name__).warning("%s cannot be locked (%s): let nothing else pack into it", out, error)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write to {out}", value=os.strerror(error.errno or 0), fix="choose another folder"
        ) from error


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
    with _writing_to(out):
        (out / MANIFEST).unlink(missing_ok=True)
        for part in out.glob(".*.part"):
            part.unlink(missing_ok=True)


def _remove_other_shards(out: Path, plans: Sequence[ShardPlan]) -> None:
    kept = {plan.path for plan in plans}
    for path in out.glob(SHARD_GLOB):
        if path not in kept:
            path.unlink()
            path.with_name(index_name(path.name)).unlink(missing_ok=True)


def _write_shards(
    plans: Sequence[ShardPlan], workers: int | None, on_progress: Progress | None
) -> tuple[ShardInfo, ...]:
    total = sum(len(plan.items) for plan in plans)
    num_done = 0

    def advance(num_images: int) -> None:
        nonlocal num_done
        num_done += num_images
        if on_progress is not None:
            on_progress(num_done, total)

    num_workers = num_processes(workers, len(plans))
    if num_workers == 1:
        return tuple(finished_or_written(plan, advance) for plan in plans)
    return tuple(map_in_processes(finished_or_written, plans, num_workers, lambda plan: advance(len(plan.items))))
