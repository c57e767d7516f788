"""Samples to shards: parallel, restartable, the same bytes for the same input.

A shard is written aside and takes its name after its index, the manifest comes last; whatever is killed in between, a
set with a manifest is whole, and packing again keeps the shards that are.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import piip_scale
from piip_scale.data.images import MAX_PIXELS
from piip_scale.data.orientation import Exif, Undecided
from piip_scale.data.packing.pack_plan import PackItem, Reading, ShardPlan, plan_shards
from piip_scale.data.packing.pack_writing import PackedShard, checked_only, finished_or_written
from piip_scale.data.packing.problems import MOST_SHOWN, Problems
from piip_scale.data.reading.files import json_bytes, sha256_of, write_bytes
from piip_scale.data.reading.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SHARD_GLOB,
    Category,
    Manifest,
    index_name,
    read_json_model,
)
from piip_scale.data.reading.pool import map_in_processes, num_processes
from piip_scale.data.reading.shards import read_index
from piip_scale.data.reading.targets import Counts, Targets, check_targets, pixel_counts, targets_of
from piip_scale.data.set_kinds import SET_KINDS
from piip_scale.errors import DataError
from piip_scale.logging import get_logger
from piip_scale.registry import SetKind

Progress = Callable[[int, int], None]
"""Called with the number of images packed so far and of all."""

_MEGABYTE = 1_000_000
_LOCK = ".packing.lock"


@dataclass(frozen=True)
class SetFacts:
    """What the manifest holds of a set beside its samples.

    Attributes:
        kind: What its samples are labelled with.
        categories: In label order.
        has_masks: Every annotation has a segmentation.
        options: What the user asked for; another choice makes another set.
        source: Where it comes from, for people.
        counts: Training targets of all samples; a segmentation set's are counted when they are packed.
        reduce_zero_label: As in ``Manifest``.
        undecided: As in ``Reading``.
    """

    kind: SetKind
    categories: tuple[Category, ...]
    has_masks: bool
    options: dict[str, Any]
    source: dict[str, Any]
    counts: Counts = field(default_factory=Counts)
    reduce_zero_label: bool = False
    undecided: Undecided | None = None


@dataclass(frozen=True)
class PackOptions:
    """How shards are written.

    Attributes:
        target_mb: Size of a shard, in millions of bytes.
        target_samples: Most samples in a shard.
        workers: Processes; all cores where ``None``.
        overwrite: Replace a set of another input.
        on_progress: Called after every image (one process) or shard (several).
        jpeg_quality: Compress images again with it, 1 to 100, where that makes them smaller; ``None`` stores the
            files as they are.
        exif: What becomes of an orientation in a file, as in ``resolve_orientation``.
        max_pixels: Images of more are refused.
        skip_broken: Leave out images and annotations that cannot be used; how many is in the manifest.
        report: A file that every problem is written to, a line each.

    Raises:
        DataError: A shard that can hold nothing, or a quality that is none.
    """

    target_mb: float = 256.0
    target_samples: int | None = None
    workers: int | None = None
    overwrite: bool = False
    on_progress: Progress | None = None
    jpeg_quality: int | None = None
    exif: Exif = "auto"
    max_pixels: int = MAX_PIXELS
    skip_broken: bool = False
    report: Path | None = None

    def __post_init__(self) -> None:
        if not self.target_mb > 0 or (self.target_samples is not None and self.target_samples < 1):
            value = (self.target_mb, self.target_samples)
            raise DataError("target size of a shard", value=value, rule="it must be above 0")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise DataError("JPEG quality", value=self.jpeg_quality, rule="it is 1 to 100")

    def reading(self, undecided: Undecided | None) -> Reading:
        """How files are read and stored."""
        return Reading(self.jpeg_quality, self.exif, self.max_pixels, self.skip_broken, undecided)

    def problems(self) -> Problems:
        """Where what is wrong with the input is gathered."""
        return Problems(self.skip_broken, self.report)

    def of_manifest(self, reading: Reading) -> dict[str, Any]:
        """What of it makes another set, for the manifest."""
        sizes = {"target_mb": float(self.target_mb), "target_samples": self.target_samples}
        return sizes | reading.options()


@dataclass(frozen=True)
class PackSource:
    """What a source holds, before any image is decoded.

    Attributes:
        facts: What its manifest would say.
        items: Its samples, in the order of shards.
        problems: What is wrong with it so far.
    """

    facts: SetFacts
    items: Sequence[PackItem]
    problems: Problems = field(default_factory=Problems)


def pack_items(
    items: Iterable[PackItem], out: Path, facts: SetFacts, how: PackOptions, problems: Problems | None = None
) -> Manifest:
    """Writes a set; a complete one of the same input in ``out`` is reused, an unfinished one is finished.

    Every image is decoded once to know that it is whole. What is wrong is reported at once, at the end; where reading
    the annotations brought problems that are not to be skipped, images are looked at too and nothing is written.

    Raises:
        DataError: An image or annotation is damaged, nothing can be trained on, ``out`` holds another set, or it
            cannot be written.
    """
    problems = problems if problems is not None else how.problems()
    samples = list(items)
    if not samples:
        problems.settle(_source_name(facts))
        raise DataError("images of the set", value=0, rule="there must be images that can be packed")
    target_bytes, reading = how.target_mb * _MEGABYTE, how.reading(facts.undecided)
    plans = list(
        plan_shards(samples, out, target_bytes=target_bytes, target_samples=how.target_samples, reading=reading)
    )
    if problems.stop:
        _gather(_on_all(checked_only, plans, how), problems)
        problems.settle(_source_name(facts))
    options = how.of_manifest(reading) | facts.options
    categories = [category.model_dump() for category in facts.categories]
    packed = [FORMAT_VERSION, options, categories, facts.has_masks, [plan.sha256 for plan in plans]]
    input_sha256 = sha256_of(json_bytes(packed))
    if (manifest := _complete_set(out, input_sha256, how.overwrite)) is not None:
        if how.skip_broken:
            # Nothing is written anew; what is left out is reported again.
            _gather(_on_all(finished_or_written, plans, how), problems)
        problems.settle(_source_name(facts))
        return manifest
    with _alone(out):
        _prepare(out)
        shards = _on_all(finished_or_written, plans, how)
        _gather(shards, problems)
        problems.settle(_source_name(facts))
        manifest = _manifest(facts, options, shards, problems, input_sha256)
        check_targets(facts.kind, manifest.targets or Targets(trainable=()), str(out), manifest.num_samples)
        _remove_other_shards(out, {shard.info.name for shard in shards if shard.info is not None})
        write_bytes(out / MANIFEST, manifest.model_dump_json(indent=1).encode())
        return manifest


def _source_name(facts: SetFacts) -> str:
    return str(next((value for value in facts.source.values() if value), "the set"))


def _gather(shards: Sequence[PackedShard], problems: Problems) -> None:
    """Takes down what came up while images were read; what could be overlooked is logged."""
    for shard in shards:
        problems.found += [("image", error) for _, error in shard.broken]
    flaws, logger = [flaw for shard in shards for flaw in shard.flaws], get_logger(__name__)
    for line in flaws[:MOST_SHOWN]:
        logger.warning("%s", line)
    if len(flaws) > MOST_SHOWN:
        logger.warning("... and %d more such images", len(flaws) - MOST_SHOWN)


def _manifest(
    facts: SetFacts, options: dict[str, Any], shards: Sequence[PackedShard], problems: Problems, input_sha256: str
) -> Manifest:
    infos = tuple(shard.info for shard in shards if shard.info is not None)
    if not infos:
        raise DataError("images of the set", value=0, rule="there must be images that can be packed")
    num_turned = sum(shard.num_turned for shard in shards)
    if num_turned:
        get_logger(__name__).info("%d images are turned as their EXIF data say", num_turned)
    turned = {"num_turned": num_turned} if num_turned else {}
    return Manifest(
        format_version=FORMAT_VERSION,
        kind=facts.kind,
        reduce_zero_label=facts.reduce_zero_label,
        categories=facts.categories,
        has_masks=facts.has_masks,
        num_samples=sum(info.num_samples for info in infos),
        num_annotations=sum(shard.num_annotations for shard in shards),
        targets=_targets(facts, shards),
        shards=infos,
        input_sha256=input_sha256,
        made_with={**options, **facts.source, **turned, **problems.num_skipped(), "piip_scale": piip_scale.__version__},
    )


def _targets(facts: SetFacts, shards: Sequence[PackedShard]) -> Targets:
    counts, count = Counts(facts.counts), SET_KINDS[facts.kind].load("counts")
    label_of_category = {category.id: label for label, category in enumerate(facts.categories)}
    for shard in shards:
        counts += pixel_counts(shard.pixels_of_class)
        for item, _ in shard.broken:
            counts -= count(json.loads(item.notes), label_of_category)
    return targets_of(counts, len(facts.categories))


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


def _remove_other_shards(out: Path, names: Container[str]) -> None:
    for path in out.glob(SHARD_GLOB):
        if path.name not in names:
            path.unlink()
            path.with_name(index_name(path.name)).unlink(missing_ok=True)


def _on_all(work: Callable[..., PackedShard], plans: Sequence[ShardPlan], how: PackOptions) -> tuple[PackedShard, ...]:
    """A function of every plan, in processes where there are several plans."""
    total = sum(len(plan.items) for plan in plans)
    num_done = 0

    def advance(num_images: int) -> None:
        nonlocal num_done
        num_done += num_images
        if how.on_progress is not None:
            how.on_progress(num_done, total)

    num_workers = num_processes(how.workers, len(plans))
    if num_workers == 1:
        return tuple(work(plan, advance) for plan in plans)
    return tuple(map_in_processes(work, plans, num_workers, lambda plan: advance(len(plan.items))))
