"""Loader processes stay as large as they are, and hold few files, however many batches they make."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_sets import make_coco
from sections.faulty_server import FaultyServer

from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.reading.shards import ShardSet

NUM_BATCHES, WARM_UP = 600, 200
# A worker that kept one decoded image of every batch would grow by half as much again.
BOUND_BYTES = 3 << 19
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack_coco(*make_coco(folder, NUM_BATCHES), folder / "out", target_samples=20)
    return folder / "out"


def measured(place, cache, *, leaks=False):
    """How much the worker grew after the warm-up, in bytes of its own, and the most files it had open and the first."""
    told = {"place": str(place), "cache": cache, "leaks": leaks, "num_batches": NUM_BATCHES, "warm_up": WARM_UP}
    paths = os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1])))
    command = [sys.executable, str(HERE / "memory_worker.py"), json.dumps(told)]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("place", ["folder", "http with evictions"])
def test_workers_neither_grow_nor_collect_files(packed, tmp_path, place):
    largest = max(shard.size_bytes for shard in ShardSet.open(packed).manifest.shards)
    cache = {"folder": str(tmp_path), "limit_gib": 6 * largest / 2**30, "prefetch_shards": 2}
    with FaultyServer(packed) if place != "folder" else contextlib.nullcontext() as server:
        growth, most_files, first_files = measured(server.url if server else packed, cache)
    assert growth < BOUND_BYTES
    # Batches on their way are files too; a folder's 30 shards stay open, a cache's do not.
    assert most_files - first_files <= (16 if server else 46)


def test_a_leak_of_an_image_a_batch_would_be_seen(packed, tmp_path):
    assert measured(packed, {"folder": str(tmp_path)}, leaks=True)[0] > BOUND_BYTES
