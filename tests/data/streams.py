"""Loaders over made sets wherever they lie, and what their batches hold."""

import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass

from piip_scale.config.detection import AugmentConfig, DetectionData
from piip_scale.data.reading.shards import ShardSet
from piip_scale.data.samples.detection import DetectionSamples
from piip_scale.data.stream import ShardLoader
from piip_scale.world import World

AUGMENT = AugmentConfig(
    jitter_scale=(0.5, 2.0), crop_px=(96, 96), short_edge_px=(64,), max_edge_px=100, pad_multiple_px=32
)


def loader(location, *, rank=0, num_ranks=1, accumulation=1, broken_samples=None, **keys):
    keys = {"micro_batch_size": 4, "num_streams": 12, "workers": 0, "augment": AUGMENT} | keys
    config = DetectionData(train_shards=str(location), val_shards=str(location), **keys)
    world = World(rank=rank, num_ranks=num_ranks, ranks_per_node=num_ranks, local_rank=rank)
    shards = ShardSet.open(location, cache=config.cache)
    samples = DetectionSamples(shards, config.augment)
    return ShardLoader(
        shards, config, samples, seed=3, world=world, accumulation=accumulation, broken_samples=broken_samples
    )


def content(batch):
    """Everything of each image of a batch, by key, without the padding."""
    found = {}
    for image, instances, info in zip(batch.images_BHWC, batch.instances, batch.infos, strict=True):
        tensors = (instances.boxes_xyxy_px, instances.labels, instances.is_crowd, instances.mini_masks)
        pixels = image[: info.size_px[0], : info.size_px[1]]
        found[info.key] = (info, *(None if t is None else t.numpy().tobytes() for t in (pixels, *tensors)))
    return found


def keys_of(batches):
    return [info.key for batch in batches for info in batch.infos]


def bytes_in(folder):
    """What a cache holds, added up while nobody can make room or take it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        total = 0
        for item in os.scandir(folder):
            # A part whose fetch failed goes without the lock.
            with suppress(FileNotFoundError):
                total += item.stat().st_size
        return total
    finally:
        # A process that was forked meanwhile has the descriptor too, and would keep the lock for ever.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@dataclass(frozen=True)
class Drawn:
    """A batch of nothing but keys and what chance gave each sample."""

    samples: tuple

    def pin_memory(self):
        return self

    def batch(self):
        return self.samples


class Draws:
    """A ``SampleMaker`` of samples that are cheap to make and tell everything of the order and of chance."""

    def sample(self, raw, rng):
        return raw.key, int(rng.integers(1 << 40))

    def collate(self, samples, *, training):
        return Drawn(tuple(samples))


def draws(location, *, nodes=1, per_node=1, global_batch=12, cache_of_node=None, **keys):
    """The loaders of all ranks of a world, of samples that are cheap to make; each node has a cache of its own."""
    loaders = []
    for rank in range(nodes * per_node):
        cache = {} if cache_of_node is None else {"folder": cache_of_node(rank // per_node)}
        size = global_batch // (nodes * per_node)
        told = {"micro_batch_size": size, "num_streams": 12, "cache": cache} | keys
        config = DetectionData(train_shards=str(location), val_shards="", **told)
        world = World(rank, nodes * per_node, rank % per_node, per_node, node_rank=rank // per_node)
        shards = ShardSet.open(location, cache=config.cache)
        loaders.append(ShardLoader(shards, config, Draws(), seed=5, world=world))
    return loaders
