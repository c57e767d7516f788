"""Images a second on one core, from stored bytes to network input, beside mmdet's pipeline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import torch

from piip_scale.config.detection import AugmentConfig
from piip_scale.data.order import random_of
from piip_scale.data.reading.shards import ShardSet
from piip_scale.data.samples.detection import DetectionSamples
from sections import mmdet_loading
from sections.mmdet_loading import CROP_PX, JITTER, JITTER_SCALE, MAX_EDGE_PX, MULTI_SCALE, SHORT_EDGES_PX
from sections.photos import Photos, packed_photos
from sections.record import table

AUGMENTS = {
    MULTI_SCALE: AugmentConfig(short_edge_px=SHORT_EDGES_PX, max_edge_px=MAX_EDGE_PX),
    JITTER: AugmentConfig(jitter_scale=JITTER_SCALE, crop_px=CROP_PX),
}
NUM_IMAGES = 192
BATCH_SIZE = 2
_ROUNDS = 15
_IMAGES_PER_ROUND = 48
_TEXT = (
    "The same 640 x 480 JPEG files (parts of scikit-learn's two photographs, {kib:.0f} KiB on average, "
    "{objects:.1f} outlined objects each, 25 corners an outline) through both, one thread, seconds of CPU time, which "
    "other work on the machine inflates but does not enter; medians of {rounds} rounds of {images} images, the three "
    "in turn in every round, and the ratio's smallest and largest round. Ours reads shards and ends in batches of two, "
    "padded; mmdet's ends in packed samples, unpadded. `poly2mask=False` is mmdet without the bitmaps that its mask "
    "heads train on."
)


def section() -> str:
    """The table of both recipes."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with packed_photos(NUM_IMAGES) as photos:
        rows = [_row(recipe, photos) for recipe in AUGMENTS]
        sizes = [path.stat().st_size / 1024 for path in photos.images.iterdir()]
        text = _TEXT.format(
            kib=statistics.mean(sizes),
            objects=photos.shards.manifest.num_annotations / NUM_IMAGES,
            rounds=_ROUNDS,
            images=_IMAGES_PER_ROUND,
        )
    return f"{text}\n\n{table(['', 'ours', 'mmdet 3.3', 'ratio', 'mmdet, poly2mask=False', 'ratio'], rows)}"


def _row(recipe: str, photos: Photos) -> list[str]:
    maker = DetectionSamples(photos.shards, AUGMENTS[recipe])
    bitmaps = mmdet_loading.mmdet_set(recipe, photos.annotations, photos.images)
    polygons = mmdet_loading.mmdet_set(recipe, photos.annotations, photos.images, bitmaps=False)
    loaders: list[Callable[[Sequence[int], int], None]] = [
        lambda numbers, epoch: load(maker, photos.shards, numbers, epoch),
        lambda numbers, epoch: _load_mmdets(bitmaps, numbers),
        lambda numbers, epoch: _load_mmdets(polygons, numbers),
    ]
    seconds = [[_cpu_seconds(loader, round_) for loader in loaders] for round_ in range(_ROUNDS + 1)][1:]
    ours, *theirs = zip(*seconds, strict=True)
    cells = [f"{_IMAGES_PER_ROUND / statistics.median(ours):.0f}"]
    for other in theirs:
        ratios = sorted(b / a for a, b in zip(ours, other, strict=True))
        cells.append(f"{_IMAGES_PER_ROUND / statistics.median(other):.0f}")
        cells.append(f"**{statistics.median(ratios):.1f}** ({ratios[0]:.1f}-{ratios[-1]:.1f})")
    return [recipe, *cells]


def load(maker: DetectionSamples, shards: ShardSet, numbers: Sequence[int], epoch: int) -> None:
    """Batches of some samples, as a loader's process makes them."""
    for first in range(0, len(numbers), BATCH_SIZE):
        batch = numbers[first : first + BATCH_SIZE]
        samples = [maker.sample(shards.read(number), random_of(0, epoch, number)) for number in batch]
        maker.collate(samples, training=True)


def _load_mmdets(dataset: Any, numbers: Sequence[int]) -> None:
    for number in numbers:
        dataset[number]


def _cpu_seconds(loader: Callable[[Sequence[int], int], None], round_: int) -> float:
    first = round_ * _IMAGES_PER_ROUND
    numbers = [number % NUM_IMAGES for number in range(first, first + _IMAGES_PER_ROUND)]
    start = time.process_time()
    loader(numbers, round_)
    return time.process_time() - start
