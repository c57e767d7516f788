"""Reading a packed set to the last byte: is it what was packed, and does it share images with another?"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from piip_scale.config.run import CacheConfig
from piip_scale.data.augment.geometry import Geometry, Window
from piip_scale.data.augment.transforms import apply_geometry
from piip_scale.data.images import Image
from piip_scale.data.reading.decoding import check_size, decode_labelled, decode_pixels, decode_sample
from piip_scale.data.reading.label_maps import IGNORED, decode_mapped
from piip_scale.data.reading.pool import map_in_processes, num_processes
from piip_scale.data.reading.raw import RawSample, parse_notes
from piip_scale.data.reading.shards import ShardSet
from piip_scale.data.reading.targets import Counts, Targets, check_targets, object_counts, pixel_counts, targets_of
from piip_scale.data.set_kinds import SET_KINDS
from piip_scale.errors import DataError, FetchError
from piip_scale.registry import SetKind

_DIGEST_BYTES = 16
_ROUNDING_PX = 1e-6
# Of a set that is in no folder: each process reads one shard at a time.
_CACHE_GIB = 16.0


@dataclass(frozen=True)
class VerifyReport:
    """What reading a set brought to light.

    Attributes:
        kind: What the set's samples are labelled with.
        classes: Its class names, in label order.
        targets: What there is to train on.
        problems: One line each; empty for a sound set.
        shared_images: Pairs of a key here and a key in the other set whose images have the same pixels.
    """

    kind: SetKind
    classes: tuple[str, ...]
    num_samples: int
    num_targets: int
    targets: Targets
    problems: tuple[str, ...]
    shared_images: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Findings:
    num_targets: int
    counts: Counts
    problems: tuple[str, ...]
    digests: tuple[tuple[bytes, str], ...]


def verify_shards(
    location: str | Path,
    *,
    other: str | Path | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    max_pixels: int | None = None,
) -> VerifyReport:
    """Checks every shard's checksum, decodes every sample, and looks at every label, label map, box and mask.

    Args:
        location: The set; where it is in no folder, it is fetched anew.
        other: Another set that must not share images with it, such as the validation set. Images are compared by
            their pixels, however they are stored.
        workers: Processes; all cores where not given.
        on_progress: Called with the number of samples read so far and of all, after every shard.
        max_pixels: A set with a larger image is refused; ``None`` takes the usual limit.

    Raises:
        DataError: A set is unfinished, or a shard or index is absent: then there is nothing to read.
    """
    with tempfile.TemporaryDirectory(prefix="piip_scale_verify_") as folder:
        cache = CacheConfig(folder=folder, limit_gib=_CACHE_GIB)
        locations = [each for each in (location, other) if each is not None]
        sets = [ShardSet.open(each, cache=cache, max_pixels=max_pixels) for each in locations]
        return _verify_sets(sets, workers, on_progress)


def _verify_sets(
    sets: Sequence[ShardSet], workers: int | None, on_progress: Callable[[int, int], None] | None
) -> VerifyReport:
    jobs = [(shards, number) for shards in sets for number in range(len(shards.manifest.shards))]
    total, num_done = sum(map(len, sets)), 0

    def advance(job: tuple[ShardSet, int]) -> None:
        nonlocal num_done
        num_done += len(job[0].numbers_of_shard(job[1]))
        if on_progress is not None:
            on_progress(num_done, total)

    read = partial(_read_shard, sets[0].location, len(sets) > 1)
    found = map_in_processes(read, jobs, num_processes(workers, len(jobs)), advance)
    here, there = found[: len(sets[0].manifest.shards)], found[len(sets[0].manifest.shards) :]
    keys_there = {digest: key for findings in there for digest, key in findings.digests}
    targets = _targets(sets[0], here)
    problems = [problem for findings in here for problem in findings.problems]
    try:
        check_targets(sets[0].manifest.kind, targets, sets[0].location, len(sets[0]))
    except DataError as error:
        problems.append(error.line)
    return VerifyReport(
        kind=sets[0].manifest.kind,
        classes=sets[0].classes,
        num_samples=len(sets[0]),
        num_targets=sum(findings.num_targets for findings in here),
        targets=targets,
        problems=tuple(problems),
        shared_images=tuple(
            (key, keys_there[digest]) for findings in here for digest, key in findings.digests if digest in keys_there
        ),
    )


def _targets(shards: ShardSet, findings: Sequence[_Findings]) -> Targets:
    counts: Counts = Counter()
    for each in findings:
        counts.update(each.counts)
    return targets_of(counts, len(shards.classes))


def _read_shard(checked_location: str, compare: bool, job: tuple[ShardSet, int]) -> _Findings:
    """Everything about a shard of the set under check; of another set, only what its images are."""
    shards, number = job
    info = shards.manifest.shards[number]
    is_checked = shards.location == checked_location
    problems, digests, num_targets = [], [], 0
    counts: Counts = Counter()
    try:
        shards.fetch(number)
    except FetchError as error:
        return _Findings(0, counts, (str(error),), ())
    if is_checked and shards.files.sha256(info) != info.sha256:
        problems.append(f"shard {info.name} changed since it was packed: its SHA-256 is not the manifest's")
    look = SET_KINDS[shards.manifest.kind].load("check") if is_checked else _look_at_pixels
    for index in shards.numbers_of_shard(number):
        raw = shards.read(index)
        try:
            targets, pixels, of_sample = look(shards, raw, index)
            counts.update(of_sample)
            if is_checked:
                _check_categories(shards, raw, index, of_sample)
        except DataError as error:
            # A damaged image can still be the same file as another one.
            targets, pixels = 0, np.frombuffer(raw.image, np.uint8)
            if is_checked:
                problems.append(f"{info.name}: {error}")
        num_targets += targets
        if compare:
            digests.append((_digest(pixels), raw.key))
    return _Findings(num_targets, counts, tuple(problems), tuple(digests))


def _check_categories(shards: ShardSet, raw: RawSample, number: int, counts: Counts) -> None:
    """The index says the classes that the sample can train, where it says any."""
    if not shards.has_category_ids:
        return
    numbers, labels = shards.labels_of_samples
    said = labels[slice(*np.searchsorted(numbers, (number, number + 1)))].tolist()
    held = sorted(label for (label, reason), count in counts.items() if count and not reason)
    if sorted(said) != held:
        raise DataError(
            f"sample {raw.key} has the labels {held}", rule=f"its index says {sorted(said)}", fix="pack the set again"
        )


def _digest(pixels: Image) -> bytes:
    return hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=_DIGEST_BYTES).digest()


_Look = tuple[int, Image, Counts]
"""What a sample holds: the number of its targets, its pixels, and what of it can be trained on."""


def _look_at_pixels(shards: ShardSet, raw: RawSample, index: int) -> _Look:
    return 0, decode_pixels(raw), Counter()


def look_at_objects(shards: ShardSet, raw: RawSample, index: int) -> _Look:
    """Boxes lie inside the image, and masks inside their boxes."""
    sample = decode_sample(raw, shards.label_of_category, has_masks=shards.manifest.has_masks)
    height, width = sample.pixels.shape[:2]
    boxes = sample.boxes_xyxy_px
    # Packing stores x, y, width, height: adding them up again may overshoot by a rounding.
    beyond = np.abs(boxes - np.clip(boxes, 0, (width, height, width, height))).max(axis=1) > _ROUNDING_PX
    outside = beyond | (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    if outside.any():
        raise DataError(f"sample {raw.key} has the box {boxes[outside][0].tolist()} outside its image")
    target = apply_geometry(sample, Geometry(Window(0, 0, width, height), (height, width)))
    if target.mini_masks is not None and not target.mini_masks.any(axis=(1, 2)).all():
        raise DataError(f"sample {raw.key} has a mask that does not reach into its box")
    counts = object_counts(parse_notes(raw), shards.label_of_category)
    return len(target.labels), sample.pixels, counts


def look_at_label(shards: ShardSet, raw: RawSample, index: int) -> _Look:
    """The label is one of the set's."""
    sample = decode_labelled(raw, len(shards.classes))
    height_px, width_px = shards.sizes_px[index].tolist()
    check_size(sample.pixels, height_px, width_px, raw.key)
    return 1, sample.pixels, Counter({(sample.label, ""): 1})


def look_at_map(shards: ShardSet, raw: RawSample, index: int) -> _Look:
    """The label map is as large as its image and holds the set's labels alone."""
    sample = decode_mapped(raw, shards.map_rule)
    height_px, width_px = shards.sizes_px[index].tolist()
    check_size(sample.pixels, height_px, width_px, raw.key)
    pixels = np.bincount(sample.labels.ravel(), minlength=IGNORED + 1).tolist()
    return 1, sample.pixels, pixel_counts([*pixels[: len(shards.classes)], pixels[IGNORED]])
