"""Shards are fetched ahead of need, in the order of need, bounded, and nothing is left behind."""

import fcntl
import threading
import time

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_sets import make_coco
from sections.faulty_server import FaultyServer
from streams import loader

from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.reading import fetching
from piip_scale.data.reading.fetching import pause_s
from piip_scale.data.reading.prefetch import Prefetcher, shard_use
from piip_scale.errors import DataError, FetchError


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack_coco(*make_coco(folder, 48), folder / "out", target_samples=2)
    return folder / "out"


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=12), st.data())
def test_use_is_what_a_walk_through_the_batches_finds(batches, data):
    use = shard_use([np.array(batch) for batch in batches])
    walk = [(number, shard) for number, batch in enumerate(batches) for shard in batch]
    firsts, lasts = {}, {}
    for number, shard in walk:
        firsts.setdefault(shard, number)
        lasts[shard] = number
    assert use.shards.tolist() == list(firsts)
    assert use.first_batch.tolist() == list(firsts.values())
    assert use.last_batch.tolist() == [lasts[shard] for shard in firsts]
    sizes = data.draw(st.lists(st.integers(1, 1000), min_size=10, max_size=10))
    at_once = [
        sum(sizes[shard] for shard in firsts if firsts[shard] <= number <= lasts[shard])
        for number in range(len(batches))
    ]
    assert use.most_bytes_at_once(sizes) == max(at_once, default=0)


@given(st.integers(1, 5000), st.text(max_size=20))
def test_pauses_grow_are_bounded_and_spread(failures, key):
    longest = min(0.5 * 2.0 ** min(failures - 1, 50), 30.0)
    assert longest / 2 <= pause_s(failures, key) <= longest
    assert pause_s(failures, key) == pause_s(failures, key)


def test_nodes_that_failed_together_do_not_come_back_together():
    assert len({round(pause_s(3, f"node{n} shard-000001.tar"), 3) for n in range(64)}) > 50


def wait_until(true, seconds=240):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("ahead", [1, 3, 20])
def test_as_many_as_asked_for_are_fetched_in_order(ahead):
    fetched = []
    first_batch = [0, 0, 2, 2, 5, 7, 7, 9]
    prefetcher = Prefetcher(lambda shard, _: fetched.append(shard), list(range(10, 18)), first_batch, ahead)
    prefetcher.start()
    for batch, needed in ((0, 2), (1, 2), (2, 4), (6, 5), (9, 8)):
        prefetcher.advance(batch)
        wanted = min(needed + ahead, 8)
        wait_until(lambda wanted=wanted: len(fetched) == wanted)
        time.sleep(0.02)
        assert sorted(fetched) == list(range(10, 10 + wanted))
    prefetcher.close()


def test_what_passes_is_left_and_what_does_not_is_told():
    def fetch(shard, _):
        error = FetchError(f"shard {shard}")
        error.is_final = shard == 3
        raise error

    prefetcher = Prefetcher(fetch, [1, 2, 3, 4], [0, 1, 2, 3], 1)
    prefetcher.start()
    prefetcher.advance(0)
    time.sleep(0.1)
    prefetcher.advance(1)
    wait_until(lambda: prefetcher.error is not None)
    with pytest.raises(DataError, match="shard 3"):
        prefetcher.advance(1)
    prefetcher.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_in_the_middle_of_downloads_leaves_nothing(packed, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(fetching, "FIRST_PAUSE_S", 600.0)
    # Some hang, some are between two tries.
    faults = {n: ("stall", "503")[n % 2] for n in range(4, 24)}
    threads, processes = set(threading.enumerate()), set(psutil.Process().children())
    with FaultyServer(packed, lambda name, _: faults.get(int(name[6:12])) if name.endswith(".tar") else None) as server:
        keys = {"num_streams": 1, "micro_batch_size": 1, "workers": workers}
        stream = loader(server.url, cache={"folder": str(tmp_path)}, **keys)
        shards_first = {int(stream.shards.shard_of(numbers)[0]) for numbers in stream._requests(0)[:1]}
        faults.pop(shards_first.pop(), None)
        batches = stream.batches(0)
        next(batches)
        begun = time.monotonic()
        wait_until(lambda: sum(server.faults.values()) >= 2)
        batches.close()
        assert time.monotonic() - begun < 120  # not the pause, however busy the machine
    left = {thread.name for thread in set(threading.enumerate()) - threads}
    # fsspec keeps its one thread for the connections of the whole process.
    assert not {name for name in left if name.startswith("prefetch")}
    assert not psutil.wait_procs(set(psutil.Process().children()) - processes, timeout=240)[1]
    # A worker ends in the midst of what it fetches itself; the next one who fetches takes that over, or removes it.
    parts = list(tmp_path.glob("*.part"))
    assert workers or not parts
    for part in parts:
        with part.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_next_epoch_is_fetched_ahead_too(packed, tmp_path, monkeypatch):
    with FaultyServer(packed) as server:
        cache = {"folder": str(tmp_path), "prefetch_shards": 2}
        stream = loader(server.url, num_streams=1, micro_batch_size=2, cache=cache)
        fetched, fetch = [], stream.shards.fetch
        monkeypatch.setattr(stream.shards, "fetch", lambda shard, stop: [fetch(shard, stop), fetched.append(shard)])
        now, then = (stream._use(stream._requests(epoch)).shards.tolist() for epoch in (0, 1))
        batches = stream.batches(0)
        for _ in range(len(stream) - 1):
            next(batches)
        wait_until(lambda: len(fetched) == len(now) + 2)
        assert sorted(fetched) == sorted(now + then[:2])
        batches.close()
