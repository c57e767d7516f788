"""Loader processes stay as large as they are, and hold few files, however many batches they make."""

import contextlib

import psutil
import pytest
from made_sets import make_coco
from sections.faulty_server import FaultyServer
from streams import loader

from piip_scale.data.pack import pack_coco
from piip_scale.data.shards import ShardSet

NUM_BATCHES, WARM_UP = 600, 200
# A worker that kept one decoded image of every batch would grow by half as much again.
BOUND_BYTES = 5 << 19


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack_coco(*make_coco(folder, NUM_BATCHES), folder / "out", target_samples=20)
    return folder / "out"


def measured(stream):
    """How much the worker grew after the warm-up, in bytes of its own, and the most files it had open."""
    sizes, files, worker = [], [], None
    others = set(psutil.Process().children())
    for number, _ in enumerate(stream.batches(0)):
        if worker is None:
            (worker,) = set(psutil.Process().children()) - others
        if number % 20 == 0 and number < NUM_BATCHES - 20:
            sizes.append(worker.memory_full_info().uss)
            files.append(worker.num_fds())
    # The least of several: what comes and goes between two looks is no growth.
    warm = WARM_UP // 20
    return min(sizes[-8:]) - min(sizes[warm : warm + 8]), max(files), files[0]


@pytest.mark.parametrize("place", ["folder", "http with evictions"])
def test_workers_neither_grow_nor_collect_files(packed, tmp_path, place):
    largest = max(shard.size_bytes for shard in ShardSet.open(packed).manifest.shards)
    cache = {"folder": str(tmp_path), "limit_gib": 6 * largest / 2**30, "prefetch_shards": 2}
    with FaultyServer(packed) if place != "folder" else contextlib.nullcontext() as server:
        stream = loader(server.url if server else packed, workers=1, micro_batch_size=1, num_streams=1, cache=cache)
        growth, most_files, first_files = measured(stream)
    assert growth < BOUND_BYTES
    # Batches on their way are files too; a folder's 30 shards stay open, a cache's do not.
    assert most_files - first_files <= (16 if server else 46)


def test_a_leak_of_an_image_a_batch_would_be_seen(packed):
    stream = loader(packed, workers=1, micro_batch_size=1, num_streams=1)
    sample, kept = stream.maker.sample, []

    def leaking(raw, rng):
        made = sample(raw, rng)
        kept.append(bytearray(9_000))
        return made

    stream.maker.sample = leaking
    assert measured(stream)[0] > BOUND_BYTES
