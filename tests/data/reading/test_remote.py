"""Sets that lie elsewhere: the same stream as from a folder, whatever happens on the way, or one clear line."""

import json
import logging
import os
import shlex
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import preloaded
import pytest
from made_sets import make_coco
from sections.faulty_server import FaultyServer
from streams import bytes_in, content, keys_of, loader

from piip_scale.config.run import CacheConfig
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.packing.verify import verify_shards
from piip_scale.data.reading import fetching
from piip_scale.data.reading.files import sha256_of
from piip_scale.data.reading.set_files import has_manifest
from piip_scale.data.reading.shards import ShardSet
from piip_scale.errors import DataError, FetchError

GIB = 2**30


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack_coco(*make_coco(folder, 41), folder / "out", target_samples=5)
    return folder / "out"


@pytest.fixture
def cache(tmp_path):
    # A busy machine brings nothing for a while now and then, which is no failure.
    return {"folder": str(tmp_path / "cache"), "stall_seconds": 300, "retries": 3}


@pytest.fixture
def impatient(cache):
    """Where something stalls for good; a busy machine, too, brings nothing for that long, so many tries are needed."""
    return cache | {"stall_seconds": 0.3, "retries": 1000}


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch):
    monkeypatch.setattr(fetching, "FIRST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def expected(packed):
    return [content(batch) for batch in loader(packed).batches(0)]


def same_stream(location, cache, expected, **keys):
    return [content(batch) for batch in loader(location, cache=cache, **keys).batches(0)] == expected


FAULTS = ("503", "stall", "truncate", "garble", None)


def each_fault_in_turn(name, number):
    """Every file meets faults before it comes, another one first for every file."""
    if number > 2 * len(FAULTS):
        return None
    fault = FAULTS[(number + len(name) + ord(name.removesuffix(".index.json").removesuffix(".tar")[-1])) % len(FAULTS)]
    # Nothing vouches for the manifest, which vouches for all.
    return None if (name, fault) == ("manifest.json", "garble") else fault


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranges", [True, False])
def test_nothing_is_lost_or_repeated_on_a_bad_line(packed, impatient, expected, workers, ranges, monkeypatch):
    # A shard then comes in several requests, and a failed one does not cost what others brought.
    monkeypatch.setattr("piip_scale.data.reading.sources._BLOCK_BYTES", 8000)
    with FaultyServer(packed, each_fault_in_turn, ranges=ranges) as server:
        assert same_stream(server.url, impatient, expected, workers=workers)
    assert set(server.faults) == {"503", "stall", "truncate", "garble"}


def test_a_file_comes_once_for_all_ranks_workers_and_epochs(packed, cache):
    with FaultyServer(packed, seconds_per_piece=0.02) as server:
        loaders = [loader(server.url, rank=rank, num_ranks=2, workers=2, cache=cache) for rank in range(2)]
        for epoch in range(2):
            streams = [each.batches(epoch) for each in loaders]
            # Both ranks at once: each batch of one is drawn between two of the other.
            keys = keys_of(batch for pair in zip(*streams, strict=True) for batch in pair)
            assert len(set(keys)) == len(keys) == 40
        assert server.requests.pop("manifest.json") == 2
        assert set(server.requests.values()) == {1}
        assert len(server.requests) == 18


def test_resuming_is_exact_whatever_the_cache_holds(packed, cache, expected):
    with FaultyServer(packed) as server:
        begun = loader(server.url, workers=2, cache=cache).batches(0)
        first = [content(next(begun)) for _ in range(4)]
        begun.close()
        again = [content(batch) for batch in loader(server.url, workers=1, cache=cache).batches(0, 4)]
        assert first + again == expected
        empty = cache | {"folder": f"{cache['folder']}2"}
        cut = [loader(server.url, rank=r, num_ranks=2, micro_batch_size=2, cache=empty).batches(0, 4) for r in (0, 1)]
        both = [content(a) | content(b) for a, b in zip(*cut, strict=True)]
    assert both == expected[4:]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_limit_holds_at_every_moment(packed, cache, expected, workers):
    largest = max(shard.size_bytes for shard in ShardSet.open(packed).manifest.shards)
    limit = int(2.5 * largest)
    seen, done = [], threading.Event()
    Path(cache["folder"]).mkdir()

    def watch():
        while not done.is_set():
            seen.append(bytes_in(cache["folder"]))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    with FaultyServer(packed) as server:
        watcher.start()
        try:
            assert same_stream(server.url, cache | {"limit_gib": limit / GIB}, expected, workers=workers)
        finally:
            done.set()
            watcher.join()
        assert largest < max(seen) <= limit
        assert sum(server.requests.values()) > 20, "nothing was evicted"


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_a_cache_too_small_for_the_order_is_told_once(packed, cache, caplog, monkeypatch, num_ranks):
    monkeypatch.setattr(logging.getLogger("piip_scale"), "propagate", True)
    total = sum(shard.size_bytes for shard in ShardSet.open(packed).manifest.shards)
    with FaultyServer(packed) as server, caplog.at_level(logging.WARNING, logger="piip_scale"):
        for share in (1.1, 0.6):
            config = cache | {"limit_gib": share * total / GIB}
            for rank in range(num_ranks):
                keys = {"rank": rank, "num_ranks": num_ranks, "micro_batch_size": 4 // num_ranks, "num_streams": 4}
                stream = loader(server.url, cache=config, **keys)
                for epoch in range(2):
                    list(stream.batches(epoch))
            assert len(caplog.records) == (share < 1)
    assert "be fetched again and again; raise it" in caplog.records[0].getMessage()


def test_a_smaller_limit_than_before_is_kept_too(packed, cache, expected):
    with FaultyServer(packed) as server:
        assert same_stream(server.url, cache, expected)
        shards = ShardSet.open(packed).manifest.shards
        limit = 2 * max(shard.size_bytes for shard in shards)
        (Path(cache["folder"]) / f"{shards[0].sha256}.cached").unlink()
        assert same_stream(server.url, cache | {"limit_gib": limit / GIB}, expected)
    assert bytes_in(cache["folder"]) <= limit


def test_a_shard_larger_than_the_cache_says_so(packed, cache):
    with FaultyServer(packed) as server, pytest.raises(DataError, match=r"shard-.*does not fit.*data.cache.limit_gib="):
        list(loader(server.url, cache=cache | {"limit_gib": 8000 / GIB}).batches(0))


def test_damaged_copies_are_fetched_again(packed, cache, expected):
    with FaultyServer(packed) as server:
        assert same_stream(server.url, cache, expected)
        shards = ShardSet.open(packed).manifest.shards
        cut, zeroed, index = (
            Path(cache["folder"]) / f"{name}.cached"
            for name in (shards[1].sha256, shards[3].sha256, shards[2].index_sha256)
        )
        os.truncate(cut, 700)
        zeroed.write_bytes(b"\0" * zeroed.stat().st_size)
        index.write_bytes(b"{" + index.read_bytes()[1:-1] + b" ")
        again = loader(server.url, cache=cache, workers=2)
        assert [content(batch) for batch in again.batches(0)] == expected
        assert again.num_broken == 0
        twice = {name for name, count in server.requests.items() if count > 1}
    assert twice == {"manifest.json", shards[1].name, shards[3].name, shards[2].index_name}


def test_a_copy_that_another_process_mended_meanwhile_is_read_again(packed, cache, monkeypatch):
    with FaultyServer(packed) as server:
        shards = ShardSet.open(server.url, cache=CacheConfig(**cache))
        whole = shards.read(0)
        path = Path(cache["folder"]) / f"{shards.manifest.shards[int(shards.shard_of([0])[0])].sha256}.cached"
        content, mend = path.read_bytes(), type(shards.files).mend
        path.write_bytes(bytes(len(content)))

        def after_another(files, shard):
            path.write_bytes(content)
            return mend(files, shard)

        monkeypatch.setattr(type(shards.files), "mend", after_another)
        assert shards.read(0) == whole


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        ("404", "it is not there", 1),
        ("short", "bytes came for bytes", 3),
        ("garble", "SHA-256 is not the manifest's", 3),
    ],
)
def test_a_broken_shard_stops_the_run_with_its_name(packed, cache, workers, fault, reason, requests):
    name = "shard-000004.tar"
    with FaultyServer(packed, lambda file, _: fault if file == name else None) as server:
        stream = loader(server.url, cache=cache, workers=workers).batches(0)
        with pytest.raises(FetchError, match=f"^{name} cannot be fetched from {server.url}: got .*{reason}") as caught:
            list(stream)
        assert "\n" not in caught.value.line
        # Ahead of need, and perhaps once more for this epoch and the next by whoever waited for that.
        assert requests <= server.requests[name] <= 3 * requests
    # A worker that ends in the middle leaves its part to the next who makes room.
    assert workers or not list(Path(cache["folder"]).glob("*.part"))


def test_an_outage_is_survived_or_told(packed, cache, expected):
    with FaultyServer(packed, lambda _, number: "503" if number < 4 else None) as server:
        assert same_stream(server.url, cache | {"retries": 4}, expected)
    with (
        FaultyServer(packed, lambda name, _: "503" if name.endswith("3.tar") else None) as server,
        pytest.raises(FetchError, match=r"^shard-000003.tar cannot be fetched from .*'503 .*; 3 tries; start again"),
    ):
        list(loader(server.url, cache=cache | {"folder": f"{cache['folder']}2", "retries": 2}).batches(0))


READ = """
import sys
from piip_scale.config.run import CacheConfig
from piip_scale.data.reading.shards import ShardSet
shards = ShardSet.open(sys.argv[1], cache=CacheConfig(folder=sys.argv[2]))
print("open", flush=True)
for number in range(len(shards)):
    shards.read(number)
"""


def test_a_download_that_was_killed_is_taken_over(packed, cache, expected):
    with FaultyServer(packed, lambda name, n: "stall" if name == "shard-000001.tar" and not n else None) as server:
        process = preloaded.Python(["-c", READ, server.url, cache["folder"]])
        deadline = time.monotonic() + 240
        while not server.faults["stall"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        (part,) = Path(cache["folder"]).glob("*.part")
        foreign = part.with_name("0" * 64 + ".part")
        foreign.write_bytes(b"of a process that died")
        assert same_stream(server.url, cache, expected)
    assert not part.exists()
    assert not foreign.exists()


def test_pipes_stream_as_folders_do(packed, cache, expected):
    assert same_stream(f"pipe:cat {shlex.quote(str(packed))}/{{name}}", cache, expected, workers=2)
    # Quoted, so that a name is a word to the shell and nothing else.
    assert same_stream(f"pipe:cat '{packed}'/$(basename {{name}})", cache | {"folder": f"{cache['folder']}2"}, expected)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("cat {name}-absent", "exit code 1: cat: manifest.json-absent: No such file"),
        ("cat {name}-absent; exit 7", "exit code 7: cat:"),
        ("no-such-command {name}", "exit code 127: .*not found"),
        ("sleep 600; echo {name}", "nothing came for 0.3 s"),
    ],
)
def test_a_pipe_that_fails_is_one_line(cache, command, reason):
    config = CacheConfig(**cache | {"retries": 1, "stall_seconds": 0.3 if "nothing came" in reason else 300})
    with pytest.raises(FetchError, match=r"^manifest.json cannot be fetched from pipe:.*" + reason) as caught:
        ShardSet.open(f"pipe:{command}", cache=config)
    assert "\n" not in caught.value.line


def refused_for_its_length(location, cache, most_mib):
    with pytest.raises(FetchError, match=f"more than {most_mib:g} MiB came of it, .* data.cache.max_unsized_mib"):
        ShardSet.open(location, cache=CacheConfig(**cache, max_unsized_mib=most_mib))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_of_a_length_that_nothing_states_has_a_limit(packed, cache, tmp_path, ranges):
    shutil.copytree(packed, tmp_path / "set")
    manifest = tmp_path / "set" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b" " * 2**20)
    with FaultyServer(tmp_path / "set", ranges=ranges) as server:
        refused_for_its_length(server.url, cache, 1)
        assert server.requests["manifest.json"] == 1
        assert len(ShardSet.open(server.url, cache=CacheConfig(**cache, max_unsized_mib=2))) == 41


def test_a_pipe_without_an_end_has_one(cache):
    refused_for_its_length("pipe:yes {name}", cache, 0.5)


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("ftp://host/train", r"location of shards ftp://host/train; a folder, http://, .* or pipe:COMMAND"),
        ("pipe:cat shard.tar", r"\{name\} stands for its name"),
        ("http://127.0.0.1:9/train", r"manifest.json cannot be fetched from http://127.0.0.1:9/train: got .Cannot con"),
    ],
)
def test_wrong_locations_are_one_line(cache, location, problem):
    with pytest.raises(DataError, match=problem) as caught:
        ShardSet.open(location, cache=CacheConfig(**cache | {"retries": 1}))
    assert "\n" not in caught.value.line


@pytest.mark.parametrize(("location", "package", "extra"), [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gcs")])
def test_a_missing_package_names_its_extra(monkeypatch, location, package, extra):
    import fsspec

    monkeypatch.delitem(sys.modules[fsspec.get_filesystem_class.__module__]._registry, location[:2], raising=False)
    for module in (package, f"{package}.core"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"pip install 'piip-scale\[{extra}\]'$"):
        ShardSet.open(location)


def test_a_set_is_there_or_not(packed, cache, tmp_path):
    config = CacheConfig(**cache | {"retries": 0})
    with FaultyServer(packed) as server:
        assert has_manifest(server.url, config)
        assert not has_manifest(f"{server.url}/elsewhere", config)
        assert has_manifest(f"{server.url}/{{name}}", config)
    with pytest.raises(FetchError):
        has_manifest(server.url, config)
    assert has_manifest(str(packed), config)
    assert not has_manifest(str(tmp_path), config)


def test_a_remote_set_is_verified_to_the_last_byte(packed, cache):
    with FaultyServer(packed) as server:
        report = verify_shards(server.url, workers=2)
        assert (report.num_samples, report.problems) == (41, ())
        verify_shards(server.url, workers=1)
        # Anew each time: what matters is what lies there now.
        assert server.requests["shard-000002.tar"] == 2
    with FaultyServer(packed, lambda name, _: "garble" if name == "shard-000002.tar" else None) as server:
        (problem,) = verify_shards(server.url, workers=2).problems
    assert problem.startswith("shard-000002.tar cannot be fetched from http://")


def test_a_folder_that_cannot_be_written_is_one_line(packed, cache, tmp_path):
    (tmp_path / "file").write_text("")
    with FaultyServer(packed) as server, pytest.raises(DataError, match=r"data\.cache\.folder.*Not a directory"):
        loader(server.url, cache=cache | {"folder": str(tmp_path / "file")})


def spoil_sample(folder, number):
    """Damages an image in its shard and vouches for the shard as it is then, as if it had been packed like that."""
    shards = ShardSet.open(folder)
    info = shards.manifest.shards[int(shards.shard_of(np.array([number]))[0])]
    path, index_path = folder / info.name, folder / info.index_name
    content = bytearray(path.read_bytes())
    begin = content.find(shards.read(number).image)
    content[begin + 300 : begin + 340] = bytes(40)
    path.write_bytes(content)
    index = json.loads(index_path.read_text()) | {"shard_sha256": sha256_of(bytes(content))}
    index_path.write_text(json.dumps(index))
    text = (folder / "manifest.json").read_text().replace(info.sha256, sha256_of(bytes(content)))
    text = text.replace(info.index_sha256, sha256_of(index_path.read_bytes()))
    (folder / "manifest.json").write_text(text)
    return str(shards.keys[number])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_sample_is_replaced_the_same_wherever_the_set_lies(tmp_path, cache, caplog, monkeypatch, workers):
    monkeypatch.setattr(logging.getLogger("piip_scale"), "propagate", True)
    folder = tmp_path / "out"
    pack_coco(*make_coco(tmp_path, 24), folder, target_samples=5, workers=1)
    key = spoil_sample(folder, 7)
    keys = {"max_broken_share": 0.1, "num_ranks": 2, "micro_batch_size": 3, "workers": workers, "cache": cache}
    found = []
    with FaultyServer(folder) as server, caplog.at_level(logging.WARNING, logger="piip_scale"):
        for place in (folder, server.url, f"pipe:cat {shlex.quote(str(folder))}/{{name}}"):
            caplog.clear()
            ranks = [loader(place, rank=rank, **keys) for rank in range(2)]
            found.append([[content(batch) for batch in rank.batches(e)] for e in range(3) for rank in ranks])
            # Once an epoch in all, whichever rank has it; without a run's folder each that meets it names it once.
            assert sum(rank.num_broken for rank in ranks) == 3
            named = [record.args[0] for record in caplog.records if "replaced by a neighbour" in record.getMessage()]
            assert set(named) == {key}
            assert len(named) == sum(rank.num_broken > 0 for rank in ranks)
        # Whole as it is, the copy of its shard is kept.
        assert set(server.requests.values()) <= {1, 2}
    assert found[0] == found[1] == found[2]
    assert key not in {name for rank in found[0] for batch in rank for name in batch}
