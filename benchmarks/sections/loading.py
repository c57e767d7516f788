"""A loader with two processes beside mmdet's, the wait for the first batch, and what its processes keep in memory."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import cv2
import psutil
import torch

from piip_scale.config.detection import DetectionData
from piip_scale.data.reading.shards import ShardSet
from piip_scale.data.samples.detection import DetectionSamples
from piip_scale.data.stream import ShardLoader
from piip_scale.world import World
from sections.mmdet_loading import JITTER, MULTI_SCALE, mmdet_set
from sections.photos import Photos, packed_photos
from sections.record import table
from sections.throughput import AUGMENTS, BATCH_SIZE

WORKERS = 2
_NUM_IMAGES = 192
_ROUNDS = 3
_EPOCHS_KEPT = 12
_MIB = 2**20
_ALONE = World(0, 1, 0, 1, "127.0.0.1", 1, "single")
_TEXT = (
    "The same images as for the throughput, batches of two, two processes, over an epoch of {images} from its start "
    "(processes included) to its last batch in the training process; images a second of clock and of CPU time of all "
    "processes, medians of {rounds} epochs in turn. mmdet's is torch's loader over its data set, with its own collate "
    "function, as its runner builds it; its samples still have to be padded into batches."
)


def section() -> str:
    """The tables of both recipes."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with packed_photos(_NUM_IMAGES) as photos:
        rows = [_row(recipe, photos) for recipe in (MULTI_SCALE, JITTER)]
    text = _TEXT.format(images=_NUM_IMAGES, rounds=_ROUNDS)
    header = ["", "ours", "mmdet", "ours / CPU s", "mmdet / CPU s", "ratio", "first batch, s", "mmdet's, s"]
    return f"{text}\n\n{table(header, rows)}"


def our_loader(shards: ShardSet, recipe: str, workers: int = WORKERS) -> ShardLoader[Any]:
    """A loader of one rank for a recipe."""
    data = DetectionData(train_shards="-", val_shards="-", micro_batch_size=BATCH_SIZE, workers=workers)
    return ShardLoader(shards, data, DetectionSamples(shards, AUGMENTS[recipe]), seed=0, world=_ALONE)


def _row(recipe: str, photos: Photos) -> list[str]:
    from mmengine.dataset import DefaultSampler, pseudo_collate

    ours = our_loader(photos.shards, recipe)
    dataset = mmdet_set(recipe, photos.annotations, photos.images)
    theirs = torch.utils.data.DataLoader(
        dataset,
        batch_size=BATCH_SIZE,
        sampler=DefaultSampler(dataset, shuffle=True),
        num_workers=WORKERS,
        collate_fn=pseudo_collate,
        drop_last=True,
    )
    measured = []
    for epoch in range(_ROUNDS + 1):
        measured.append((_seconds(ours.batches(epoch)), _seconds(iter(theirs))))
    mine, others = (list(zip(*part, strict=True)) for part in zip(*measured[1:], strict=True))
    clock, cpu, first = (statistics.median(part) for part in mine)
    their_clock, their_cpu, their_first = (statistics.median(part) for part in others)
    rates = [f"{_NUM_IMAGES / seconds:.0f}" for seconds in (clock, their_clock, cpu, their_cpu)]
    return [recipe, *rates, f"**{their_cpu / cpu:.1f}**", f"{first:.2f}", f"{their_first:.2f}"]


def _seconds(batches: Iterator[Any]) -> tuple[float, float, float]:
    """Clock and CPU seconds until the last batch, and clock seconds until the first."""
    start, cpu = time.monotonic(), _cpu_seconds()
    first = None
    for _ in batches:
        first = first if first is not None else time.monotonic() - start
    return time.monotonic() - start, _cpu_seconds() - cpu, first or 0.0


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def memory_section() -> str:
    """Private memory of the loader's processes over many batches."""
    cv2.setNumThreads(0)
    with packed_photos(_NUM_IMAGES) as photos:
        rows = [_memory_row(recipe, photos.shards) for recipe in (MULTI_SCALE, JITTER)]
    text = (
        "Private memory (USS) of a process that makes batches as a loader's processes do, in MiB, after so many "
        f"images: {_EPOCHS_KEPT} epochs of {_NUM_IMAGES}, two images a batch."
    )
    return f"{text}\n\n{table(['images', *(str(_NUM_IMAGES * n) for n in (1, 2, 4, 8, _EPOCHS_KEPT))], rows)}"


def _memory_row(recipe: str, shards: ShardSet) -> list[str]:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_make_batches, args=(recipe, shards, queue))
    process.start()
    found: list[float] = queue.get()
    process.join()
    return [recipe, *(f"{found[n - 1]:.0f}" for n in (1, 2, 4, 8, _EPOCHS_KEPT))]


def _make_batches(recipe: str, shards: ShardSet, queue: Any) -> None:
    loader, found = our_loader(shards, recipe, workers=0), []
    for epoch in range(_EPOCHS_KEPT):
        for _ in loader.batches(epoch):
            pass
        found.append(psutil.Process().memory_full_info().uss / _MIB)
    queue.put(found)
