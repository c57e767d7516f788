"""Whole streams, with their processes, on every kind of world: nothing lost, nothing repeated, the same steps."""

import hashlib
from pathlib import Path

import preloaded
import pytest
from made_sets import make_coco
from sections.faulty_server import FaultyServer
from streams import content, draws, loader

from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.reading import fetching

NUM_IMAGES, GLOBAL_BATCH, EPOCH = 65, 12, 3
# Nodes, ranks of a node, loader processes of a rank.
WORLDS = [(1, 1, 2), (2, 1, 1), (1, 2, 0), (3, 1, 0), (2, 2, 1), (2, 6, 0)]


@pytest.fixture(scope="module")
def packed_by(tmp_path_factory):
    """Sets of the same images in shards of so many: the last is smaller than the others, or the only one."""
    folder = tmp_path_factory.mktemp("packed")
    source = make_coco(folder, NUM_IMAGES)

    def pack(size):
        pack_coco(*source, folder / str(size), target_samples=size, workers=1)
        return folder / str(size)

    return pack


def steps_of(loaders, first=0, last=None):
    """The samples of every global batch, sorted; loaders end early where ``last`` says so, as after a kill."""
    streams = [each.batches(EPOCH, first) for each in loaders]
    steps = []
    for batches in zip(*streams, strict=True):
        steps.append(sorted(sample for batch in batches for sample in batch))
        if last is not None and first + len(steps) == last:
            break
    for stream in streams:
        stream.close()
    return steps


@pytest.mark.parametrize(("size", "remote"), [(65, True), (9, True), (4, False)])
def test_every_world_sees_the_same_steps_and_goes_on_where_another_stopped(
    packed_by, tmp_path, size, remote, monkeypatch
):
    packed = packed_by(size)
    monkeypatch.setattr(fetching, "FIRST_PAUSE_S", 0.01)
    expected = steps_of(draws(packed))
    keys = [key for step in expected for key, _ in step]
    assert len(expected) == NUM_IMAGES // GLOBAL_BATCH
    assert len(set(keys)) == len(keys) == len(expected) * GLOBAL_BATCH
    with FaultyServer(packed, lambda _, number: "503" if number % 7 == 1 else None) as server:
        for turn, (nodes, per_node, workers) in enumerate(WORLDS):
            where = {"cache_of_node": lambda node, turn=turn: str(tmp_path / f"{turn}.{node}")} if remote else {}
            world = {"nodes": nodes, "per_node": per_node, "workers": workers} | where
            place = server.url if remote else packed
            stop = 1 + turn % (len(expected) - 1)
            assert steps_of(draws(place, **world), 0, stop) == expected[:stop]
            assert steps_of(draws(place, **world), stop) == expected[stop:]
            # A worker that ends in the middle leaves its part to the next who makes room.
            if remote and not workers:
                assert not [*tmp_path.glob(f"{turn}.*/*.part")]


STREAM = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from streams import content, loader
for batch in loader(sys.argv[2], workers=2, cache={"folder": sys.argv[3]}).batches(3):
    print(hashlib.sha256(repr(sorted(content(batch).items())).encode()).hexdigest(), flush=True)
"""


def test_a_stream_killed_in_mid_download_goes_on_bit_for_bit_on_other_ranks(packed_by, tmp_path):
    """Images and augmentations too; loader processes had batches ready that nobody took."""
    packed, num_ranks = packed_by(4), 2

    def digest(found):
        return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()

    expected = [digest(content(batch)) for batch in loader(packed).batches(EPOCH)]
    cache = {"folder": str(tmp_path / "cache")}
    with FaultyServer(packed, seconds_per_piece=0.05) as server:
        process = preloaded.Python(["-c", STREAM, Path(__file__).parent, server.url, cache["folder"]])
        before = [process.next_line().strip() for _ in range(3)]
        process.kill()
        process.wait()
        keys = {"num_ranks": num_ranks, "micro_batch_size": 4 // num_ranks, "workers": 1, "cache": cache}
        streams = [loader(server.url, rank=rank, **keys).batches(EPOCH, 3) for rank in range(num_ranks)]
        after = []
        for batches in zip(*streams, strict=True):
            step = {}
            for batch in batches:
                step |= content(batch)
            after.append(digest(step))
    assert before + after == expected
