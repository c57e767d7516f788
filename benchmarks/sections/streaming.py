"""Streaming: over a bad line against a folder, far into an epoch, and single samples against webdataset."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from piip_scale.config.detection import DetectionData
from piip_scale.config.run import CacheConfig
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.reading.files import json_bytes, sha256_of, write_bytes
from piip_scale.data.reading.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Category,
    Manifest,
    ShardIndex,
    ShardInfo,
    index_name,
    shard_name,
)
from piip_scale.data.reading.raw import checksum
from piip_scale.data.reading.shards import ShardSet
from piip_scale.data.samples.detection import DetectionSamples
from piip_scale.data.stream import ShardLoader
from piip_scale.demo.scenes import write_scenes
from piip_scale.world import World
from sections.faulty_server import COUNTS, Fault, FaultyServer, no_fault
from sections.record import table

NUM_IMAGES, SIDE_PX, IMAGES_PER_SHARD = 320, 480, 10
ROUNDS = 3
COCO_IMAGES, COCO_SHARDS, STEP = 118_287, 75, 10_000
# A bad line: of 16 requests for a shard one finds the server busy, one ends in the middle, one stays there.
_FAULTS: dict[int, Fault] = {3: "503", 8: "truncate", 13: "stall"}
_STALL_S = 0.5


def section() -> str:
    """Three tables."""
    with tempfile.TemporaryDirectory(prefix="piip_scale_bench_") as name:
        folder = Path(name)
        scenes = write_scenes(folder / "scenes", num_train=NUM_IMAGES, num_val=1, size_px=SIDE_PX, seed=0)
        pack_coco(scenes.train, scenes.images, folder / "set", target_samples=IMAGES_PER_SHARD)
        return "\n\n".join([_over_a_line(folder), _far_into_an_epoch(folder), _single_samples(folder / "set")])


def _over_a_line(folder: Path) -> str:
    rows: dict[str, list[tuple[float, Counter[str]]]] = {}
    for turn in range(ROUNDS):
        rows.setdefault("folder", []).append((_pass(str(folder / "set"), folder / "unused"), Counter()))
        for name, fault_of in (("http", no_fault), ("http, bad line", _bad_line())):
            with _served(folder / "set", fault_of) as (url, faults):
                cache = folder / f"cache{turn}{len(name)}"
                rows.setdefault(name, []).append((_pass(url, cache), faults()))
                rows.setdefault(f"{name}, from the cache", []).append((_pass(url, cache), Counter()))
    base = max(rate for rate, _ in rows["folder"])
    lines = [
        (name, f"{max(rate for rate, _ in found):.0f}", f"{max(rate for rate, _ in found) / base:.2f}", _told(found))
        for name, found in rows.items()
    ]
    size_mb = sum(path.stat().st_size for path in (folder / "set").glob("*.tar")) / 1e6
    return (
        f"An epoch of {NUM_IMAGES} images of {SIDE_PX} px in {NUM_IMAGES // IMAGES_PER_SHARD} shards "
        f"({size_mb:.0f} MB) by 2 loader processes, best of {ROUNDS}; the server, on this machine, fails 3 of 16 "
        f"requests for a shard, and a stall counts as one after {_STALL_S} s. Every pass gave each sample once: none "
        "was lost, none repeated.\n\n" + table(["from", "images/s", "of the folder's", "faults"], lines)
    )


def _told(found: list[tuple[float, Counter[str]]]) -> str:
    total = sum((faults for _, faults in found), Counter[str]())
    return ", ".join(f"{count} {kind}" for kind, count in sorted(total.items())) or "0"


def _bad_line() -> Callable[[str, int], Fault | None]:
    count = iter(range(1 << 30))
    return lambda name, _: _FAULTS.get(next(count) % 16) if name.endswith(".tar") else None


def _pass(location: str, cache: Path) -> float:
    """Images a second over an epoch from the first batch's request on."""
    remote = CacheConfig(folder=str(cache), stall_seconds=_STALL_S)
    config = DetectionData(
        train_shards=location, val_shards="", micro_batch_size=4, num_streams=2, workers=2, cache=remote
    )
    shards = ShardSet.open(location, cache=config.cache)
    loader = ShardLoader(shards, config, DetectionSamples(shards, config.augment), seed=0, world=World())
    started = time.perf_counter()
    drawn = [info.key for batch in loader.batches(0) for info in batch.infos]
    seconds = time.perf_counter() - started
    if len(set(drawn)) != len(drawn) or len(drawn) != NUM_IMAGES:
        raise AssertionError(f"{location} lost or repeated samples")
    return len(drawn) / seconds


@contextmanager
def _served(
    folder: Path, fault_of: Callable[[str, int], Fault | None]
) -> Iterator[tuple[str, Callable[[], Counter[str]]]]:
    """A server in a process of its own: its URL, and what counts its faults."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(folder, fault_of, there), daemon=True)
    process.start()
    url: str = here.recv()

    def faults() -> Counter[str]:
        with urllib.request.urlopen(f"{url}/{COUNTS}") as answer:
            return Counter(json.load(answer)[1])

    try:
        yield url, faults
    finally:
        here.send("end")
        process.join()


def _serve(folder: Path, fault_of: Callable[[str, int], Fault | None], pipe: Any) -> None:
    with FaultyServer(folder, fault_of) as server:
        pipe.send(server.url)
        pipe.recv()


def _far_into_an_epoch(folder: Path) -> str:
    _write_index_of_coco(folder / "coco")
    with _served(folder / "coco", no_fault) as (url, _):
        places = {"folder": str(folder / "coco"), "http": url}
        rows = [
            (
                f"{place}, {workers} loader processes, step {step:,}",
                *_first_batch(location, folder / place, workers, step),
            )
            for place, location in places.items()
            for workers, step in ((0, STEP), (2, 0), (2, STEP))
        ]
    return (
        f"Beginning at a step of an epoch of {COCO_IMAGES:,} samples in {COCO_SHARDS} shards, 8 images a batch, best "
        f"of {ROUNDS}: opening manifest and indexes, and from there to the first batch, with the epoch's order and the "
        "start of the processes. Imports are not in it; the images are tiny. Over http the first opening fetches the "
        "indexes, and is not in the best.\n\n" + table(["", "open, s", "first batch, s", "together, s"], rows)
    )


def _first_batch(location: str, cache: Path, workers: int, step: int) -> tuple[str, str, str]:
    config = DetectionData(
        train_shards=location,
        val_shards="",
        micro_batch_size=8,
        workers=workers,
        cache=CacheConfig(folder=str(cache)),
    )
    best = (float("inf"), 0.0, 0.0)
    for _ in range(ROUNDS):
        started = time.perf_counter()
        shards = ShardSet.open(location, cache=config.cache)
        opened = time.perf_counter()
        loader = ShardLoader(shards, config, DetectionSamples(shards, config.augment), seed=0, world=World())
        batches = loader.batches(0, step)
        next(batches)
        done = time.perf_counter()
        batches.close()  # type: ignore[attr-defined]
        best = min(best, (done - started, opened - started, done - opened))
    together, opening, first = best
    return f"{opening:.2f}", f"{first:.2f}", f"{together:.2f}"


def _write_index_of_coco(folder: Path) -> None:
    """As many samples as COCO's training set has, whose indexes all point to one tiny image in their shard."""
    image = cv2.imencode(".jpg", np.full((48, 64, 3), 99, np.uint8))[1].tobytes()
    notes = json_bytes({"image_id": 1, "file_name": "a.jpg", "height": 48, "width": 64, "annotations": []})
    sizes = [len(part) for part in np.array_split(np.arange(COCO_IMAGES), COCO_SHARDS)]
    shards, first = [], 0
    for number, count in enumerate(sizes):
        content = image + notes + str(number).encode()
        columns = {
            "heights_px": 48,
            "widths_px": 64,
            "image_offsets": 0,
            "image_bytes": len(image),
            "notes_offsets": len(image),
            "notes_bytes": len(notes),
            "crc32s": checksum(image, notes),
        }
        index = ShardIndex(
            shard_bytes=len(content),
            shard_sha256=sha256_of(content),
            plan_sha256="",
            num_annotations=0,
            keys=tuple(f"{key:012d}" for key in range(first, first + count)),
            image_ids=tuple(range(first, first + count)),
            **{name: (value,) * count for name, value in columns.items()},  # type: ignore[arg-type]
        )
        text, name = index.model_dump_json(exclude_defaults=True).encode(), shard_name(number)
        write_bytes(folder / name, content, durable=False)
        write_bytes(folder / index_name(name), text, durable=False)
        shards.append(
            ShardInfo(
                name=name,
                num_samples=count,
                size_bytes=len(content),
                sha256=sha256_of(content),
                index_sha256=sha256_of(text),
            )
        )
        first += count
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        categories=(Category(id=1, name="a"),),
        has_masks=True,
        num_samples=COCO_IMAGES,
        num_annotations=0,
        shards=tuple(shards),
        input_sha256="",
        made_with={},
    )
    write_bytes(folder / MANIFEST, manifest.model_dump_json().encode(), durable=False)


def _single_samples(folder: Path) -> str:
    ways = {
        "read at random through the index": lambda: _read(folder, str(folder)),
        "the same through the cache, checked": lambda: _read(folder, f"pipe:cat {folder}/{{name}}"),
        "webdataset, in the order of the tar files": lambda: _read_webdataset(folder),
    }
    rows = []
    for name, way in ways.items():
        us = min(way() for _ in range(ROUNDS))
        rows.append((name, f"{us:.0f}"))
    return (
        f"CPU time of a sample's bytes, image and annotations, not decoded; best of {ROUNDS} passes over the set, its "
        "files in the system's page cache.\n\n" + table(["", "microseconds"], rows)
    )


def _read(folder: Path, location: str) -> float:
    shards = ShardSet.open(location, cache=CacheConfig(folder=str(folder.parent / "single")))
    order = np.random.default_rng(0).permutation(len(shards)).tolist()
    for shard in range(len(shards.manifest.shards)):
        shards.fetch(shard)
    started = time.process_time()
    for number in order:
        shards.read(number)
    return (time.process_time() - started) / len(order) * 1e6


def _read_webdataset(folder: Path) -> float:
    import webdataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    stream = webdataset.WebDataset(urls, shardshuffle=False)
    started = time.process_time()
    count = sum(1 for _ in stream)
    return (time.process_time() - started) / count * 1e6
