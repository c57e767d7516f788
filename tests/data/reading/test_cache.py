"""The cache: right content, one fetch for all, never above its limit, whoever races or dies."""

import hashlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time

import pytest
from streams import bytes_in

from piip_scale.data.reading.cache import Entry, FileCache, cache_folder
from piip_scale.data.reading.sources import Stop, StoppedError
from piip_scale.errors import DataError

FORK = multiprocessing.get_context("fork")
CONTENTS = [bytes([number]) * (1000 + 100 * number) for number in range(6)]
ENTRIES = [Entry(hashlib.sha256(content).hexdigest(), len(content), f"shard {n}") for n, content in enumerate(CONTENTS)]
LIMIT = 3200


def filler(number, log=None, seconds=0.0):
    def fill(file):
        if log is not None:
            with open(log, "a") as lines:
                lines.write(f"{number}\n")
        half = len(CONTENTS[number]) // 2
        file.write(CONTENTS[number][:half])
        file.flush()
        time.sleep(seconds)
        file.write(CONTENTS[number][half:])

    return fill


def content_of(cache, number, *more, stop=None):
    with cache.open(ENTRIES[number], filler(number, *more), *([stop] if stop else [])) as file:
        return os.pread(file.fileno(), 10_000, 0)


def started(target, *arguments):
    process = FORK.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def read_many(folder, seed, rounds):
    cache = FileCache(folder, LIMIT)
    for turn in range(rounds):
        number = (seed * 7 + turn * 5 + turn * turn) % len(ENTRIES)
        assert content_of(cache, number, None, 0.001) == CONTENTS[number]


def test_racing_and_dying_processes_keep_content_and_limit(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    sizes, done = [], threading.Event()

    def watch():
        while not done.is_set():
            sizes.append(bytes_in(folder))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    readers = [started(read_many, folder, seed, 60) for seed in range(3)]
    try:
        while any(reader.is_alive() for reader in readers):
            victim = started(read_many, folder, 5, 1000)
            time.sleep(0.05)
            victim.kill()
            victim.join()
        assert [reader.exitcode for reader in readers] == [0, 0, 0]
    finally:
        done.set()
        watcher.join()
        for reader in readers:
            reader.kill()
    # More than one was there at once.
    assert max(map(len, CONTENTS)) < max(sizes) <= LIMIT
    # What the last one left is gone with the next one to make room.
    (folder / ENTRIES[0].file_name).unlink(missing_ok=True)
    content_of(FileCache(folder, LIMIT), 0)
    assert not list(folder.glob("*.part"))


def test_one_of_many_fetches_and_the_others_wait(tmp_path):
    log = tmp_path / "log"
    cache = FileCache(tmp_path / "cache", LIMIT)
    readers = [started(content_of, cache, 1, log, 0.2) for _ in range(4)]
    threads = [threading.Thread(target=content_of, args=(cache, 1, log, 0.2)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for each in (*threads, *readers):
        each.join(240)
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert log.read_text() == "1\n"


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    cache = FileCache(tmp_path, 3200)
    for number in (0, 1):
        content_of(cache, number)
    os.utime(tmp_path / ENTRIES[0].file_name, (1, 1))
    os.utime(tmp_path / ENTRIES[1].file_name, (2, 2))
    # Read again, the older one is the younger one.
    assert content_of(cache, 0, None, 60.0) == CONTENTS[0]
    content_of(cache, 2)
    assert {path.name for path in tmp_path.iterdir()} == {ENTRIES[0].file_name, ENTRIES[2].file_name}


def test_what_is_open_outlives_its_eviction(tmp_path):
    cache = FileCache(tmp_path, 1500)
    with cache.open(ENTRIES[0], filler(0)) as file:
        content_of(cache, 1)
        assert not (tmp_path / ENTRIES[0].file_name).exists()
        assert os.pread(file.fileno(), 10_000, 0) == CONTENTS[0]


def test_a_process_forked_meanwhile_does_not_keep_the_lock(tmp_path):
    cache, forked = FileCache(tmp_path, LIMIT), []

    def fill(file):
        forked.append(started(time.sleep, 600))
        filler(1)(file)

    cache.open(ENTRIES[1], fill).close()
    cache.drop(ENTRIES[1])
    before = time.monotonic()
    assert content_of(cache, 1) == CONTENTS[1]
    assert time.monotonic() - before < 120  # not until the other ends, however busy the machine
    forked[0].kill()


def test_a_lock_goes_with_its_process(tmp_path):
    cache = FileCache(tmp_path, LIMIT)
    holder = started(content_of, cache, 1, None, 600.0)
    part = tmp_path / f"{ENTRIES[1].sha256}.part"
    deadline = time.monotonic() + 240
    while not (part.exists() and part.stat().st_size == len(CONTENTS[1])):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    stop = Stop()
    threading.Timer(0.1, stop.set).start()
    with pytest.raises(StoppedError):
        content_of(cache, 1, stop=stop)
    os.kill(holder.pid, signal.SIGKILL)
    assert content_of(cache, 1) == CONTENTS[1]


def test_what_fails_leaves_nothing(tmp_path):
    cache = FileCache(tmp_path, LIMIT)

    def fail(file):
        file.write(b"half")
        raise DataError("the server is gone")

    with pytest.raises(DataError, match="the server is gone"):
        cache.open(ENTRIES[0], fail)
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"x" * 5000)
    cache = FileCache(tmp_path, LIMIT)
    for number in range(6):
        content_of(cache, number)
    assert (tmp_path / "notes.txt").stat().st_size == 5000


def test_the_automatic_folder_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = cache_folder("auto")
    assert folder.parent == tmp_path
    content_of(FileCache(folder, LIMIT), 0)
    assert folder.stat().st_mode & 0o077 == 0
    other = os.getuid() + 1
    (tmp_path / f"piip_scale_cache_{other}").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(DataError, match=r"belongs to another user; .*set data\.cache\.folder"):
        cache_folder("auto")
