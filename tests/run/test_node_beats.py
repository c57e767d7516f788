"""A node's ranks show where they are in one file, whoever of them dies, and wherever they can meet."""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path

import pytest
from sections.file_operations import count_operations

from piip_scale.errors import DataError, PiipError
from piip_scale.files import write_briefly
from piip_scale.run import node_beats
from piip_scale.run.heartbeat import COMPUTING, WAITING, Beat, late_ranks, read_beat, read_beats, write_beat, write_node
from piip_scale.run.node_beats import NodeBeats
from piip_scale.run.run_dir import RunDirectory
from piip_scale.world import World

POLL_S = 2.0
RANKS_PER_NODE = 4


class Scene:
    """Nodes of four ranks that share a run's folder; time passes when it is told to."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, num_nodes: int = 2) -> None:
        self.run = RunDirectory(path)
        self.run.heartbeats.mkdir(parents=True)
        self.now_s = self.began_s = time.time()
        for clock in ("time", "monotonic"):
            monkeypatch.setattr(node_beats.time, clock, lambda: self.now_s)
        worlds = [
            World(
                rank,
                num_nodes * RANKS_PER_NODE,
                rank % RANKS_PER_NODE,
                RANKS_PER_NODE,
                node_rank=rank // RANKS_PER_NODE,
            )
            for rank in range(num_nodes * RANKS_PER_NODE)
        ]
        self.ranks = {world.rank: NodeBeats(self.run, world, POLL_S) for world in worlds}
        self.news = {}

    def beat(self, rank: int, number: int = 5, **more) -> Beat:
        given = {
            "phase": COMPUTING,
            "step": 7,
            "waiting_s": 1.0,
            "host": f"n{rank // RANKS_PER_NODE}",
            "pid": 40 + rank,
        }
        return Beat(rank, number, 30, unix_time_s=self.now_s, **given | {"started_unix_s": self.began_s} | more)

    def poll(self, polls: int = 1, without: tuple[int, ...] = (), **numbers: int) -> None:
        for _ in range(polls):
            self.now_s += POLL_S
            for rank in self.ranks:
                if rank not in without:
                    self.news[rank] = self.ranks[rank].exchange(self.beat(rank, numbers.get(f"rank_{rank}", 5)))

    def seen(self) -> dict[int, Beat]:
        return {beat.rank: beat for beat in read_beats(self.run.heartbeats, 0.0)}

    def silent(self, beats: dict[int, Beat]) -> list[int]:
        return [rank for rank, beat in beats.items() if self.now_s - beat.unix_time_s > 30]

    def late(self) -> list[int]:
        beats = self.seen()
        return late_ranks(beats, self.silent(beats), len(self.ranks))

    def files(self) -> list[str]:
        return sorted(path.name for path in self.run.heartbeats.iterdir())


@pytest.fixture
def scene(tmp_path, monkeypatch):
    local = tmp_path / "shm"
    local.mkdir()
    monkeypatch.setattr(node_beats, "_SHARED_MEMORY", local)
    return Scene(tmp_path / "run", monkeypatch)


def test_a_node_has_one_file_and_readers_know_each_rank(scene):
    scene.poll(3)
    assert scene.files() == ["node_0.json", "node_1.json"]
    assert sorted(scene.seen()) == list(range(8))
    assert read_beat(scene.run.heartbeats, 0).pid == 40
    assert scene.late() == []
    scene.poll(30, rank_6=4)
    assert scene.late() == [6]
    assert scene.files() == ["node_0.json", "node_1.json"]


def test_a_killed_rank_stays_where_it_was_last_and_is_silent(scene):
    scene.poll(2)
    scene.poll(30, without=(5,))
    beats = scene.seen()
    assert scene.silent(beats) == [5]
    assert scene.late() == [5]
    assert beats[5].step == 7


def test_when_the_first_rank_of_a_node_dies_the_others_write_for_themselves(scene):
    scene.poll(2)
    scene.poll(30, without=(4,))
    assert scene.files() == ["node_0.json", "node_1.json", "rank_5.json", "rank_6.json", "rank_7.json"]
    assert scene.silent(scene.seen()) == [4]
    assert scene.late() == [4]
    # It had only been stopped, or its disk was: one file a node again, and nothing older than what it says.
    scene.poll(15, **{f"rank_{rank}": 9 for rank in range(8)})
    before_s = (scene.run.heartbeats / "rank_5.json").stat().st_mtime_ns
    scene.poll(15, **{f"rank_{rank}": 10 for rank in range(8)})
    assert (scene.run.heartbeats / "rank_5.json").stat().st_mtime_ns == before_s
    assert {beat.number for beat in scene.seen().values()} == {10}


def no_folder() -> Path:
    raise PiipError("no temporary folder can be written")


@pytest.mark.parametrize("why", ["no shared memory", "no folder at all", "memory of their own", "a full memory"])
def test_wherever_ranks_can_meet_every_one_is_seen(why, tmp_path, monkeypatch):
    monkeypatch.setattr(node_beats, "_SHARED_MEMORY", tmp_path / "absent")
    monkeypatch.setattr(node_beats, "temporary_folder", lambda: tmp_path)
    if why == "no folder at all":
        monkeypatch.setattr(node_beats, "temporary_folder", no_folder)
    elif why == "memory of their own":
        folders = (tmp_path / str(number) for number in itertools.count())
        monkeypatch.setattr(node_beats, "temporary_folder", lambda: next(folders))
    scene = Scene(tmp_path / "run", monkeypatch)
    if why == "a full memory":
        full = lambda folder, beat: None if folder == scene.ranks[0]._folder else write_beat(folder, beat)  # noqa: E731
        monkeypatch.setattr(node_beats, "write_beat", full)
    scene.poll(20)
    assert sorted(scene.seen()) == list(range(8))
    assert scene.silent(scene.seen()) == []
    ones = ["rank_5.json" in scene.files(), "rank_1.json" in scene.files()]
    met = {"no shared memory": [False, False], "a full memory": [False, True]}
    assert ones == met.get(why, [True, True])


def test_what_goes_on_is_written_every_ten_seconds_and_what_stands_still_every_twenty(scene, monkeypatch):
    written = []
    monkeypatch.setattr(node_beats, "write_node", lambda folder, node, beats: written.append(node))
    scene.poll(2)
    written.clear()
    numbers = itertools.count(6)
    for _ in range(30):
        scene.poll(**{f"rank_{rank}": next(numbers) for rank in range(4)})
    # Node 0 goes on, node 1 stands still; sixty seconds.
    assert (written.count(0), written.count(1)) == (6, 3)
    written.clear()
    scene.ranks[4] = NodeBeats(scene.run, World(4, 8, 0, 4, node_rank=1), POLL_S, limit_s=20.0)
    scene.poll(30)
    assert written.count(1) == 15


def test_all_of_a_node_hear_of_an_error_and_of_stacks_from_its_first_alone(scene, monkeypatch):
    scene.poll(2)
    looks = []
    first_error = RunDirectory.first_error
    monkeypatch.setattr(RunDirectory, "first_error", lambda run: looks.append(1) or first_error(run))
    scene.run.record_error(2, DataError("sample is broken"))
    scene.run.stacks.mkdir()
    scene.run.stacks_wanted.touch()
    scene.poll(2)
    assert {news.ending.line for news in scene.news.values()} == {"sample is broken"}
    assert min(news.stacks_unix_s for news in scene.news.values()) > 0
    assert len(looks) == 2 * 2


def test_processes_of_an_earlier_launch_leave_and_those_that_only_ended_do_not(scene):
    scene.poll(2)
    scene.ranks.pop(6).close(scene.beat(6))
    scene.poll(10)
    assert {news.later for news in scene.news.values()} == {None}
    later = [scene.beat(rank, pid=90 + rank, host="m7", started_unix_s=scene.now_s + 9) for rank in range(4, 8)]
    write_node(scene.run.heartbeats, 1, later)
    while scene.news[4].later is None:
        scene.poll(without=(6,))
    # It has ended itself.
    scene.poll(without=(4, 6))
    hosts = {rank: news.later and news.later.host for rank, news in scene.news.items() if rank != 6}
    assert hosts == {**dict.fromkeys(range(4)), **dict.fromkeys((4, 5, 7), "m7")}


def test_nothing_is_left_in_the_nodes_memory(scene):
    scene.poll(2)
    folder = scene.ranks[0]._folder
    assert len(list(folder.iterdir())) == RANKS_PER_NODE + 1
    for rank, node in scene.ranks.items():
        node.close(scene.beat(rank))
    assert list(folder.parent.iterdir()) == []
    killed = folder.parent / "0123456789abcdef"
    killed.mkdir()
    os.utime(killed, (0, 0))
    Scene(scene.run.path / "next", pytest.MonkeyPatch())
    assert not killed.exists()


def test_files_of_earlier_versions_are_read_and_the_newest_sign_of_a_rank_counts(tmp_path):
    def at(rank: int, unix_time_s: float, step: int) -> Beat:
        return Beat(rank, 5, 30, WAITING, step, 0.0, unix_time_s, socket.gethostname(), 1)

    write_beat(tmp_path, at(0, 10.0, 3))
    write_beat(tmp_path, at(1, 10.0, 3))
    assert [beat.step for beat in read_beats(tmp_path, 0.0)] == [3, 3]
    write_node(tmp_path, 0, [at(0, 20.0, 8), at(1, 5.0, 2)])
    assert {beat.rank: beat.step for beat in read_beats(tmp_path, 0.0)} == {0: 8, 1: 3}
    assert [read_beat(tmp_path, rank).step for rank in (0, 1)] == [8, 3]
    for text in ("[]", '{"beats": 3}', '{"beats": [3]}', '{"beats": {"rank": 0}}', "[" * 100_000):
        (tmp_path / "node_0.json").write_text(text)
        assert {beat.rank: beat.step for beat in read_beats(tmp_path, 0.0)} == {0: 3, 1: 3}


def test_a_beat_costs_ranks_nothing_on_the_shared_disk_but_the_first_of_a_node(scene):
    """At 512 ranks on 64 nodes, 90 operations a second, where a file for each rank and beat took 3,600."""
    scene.poll(2)
    with count_operations(scene.run.path) as operations:
        scene.poll(30)
    # A minute of two nodes: an error and a request looked for at each poll; their file read, written, renamed thrice.
    assert sum(operations.values()) == 2 * (30 * 2 + 3 * 3)


def test_a_first_write_makes_the_folder_and_a_disk_that_refuses_is_silent(tmp_path):
    write_briefly(tmp_path / "new" / "file", "text")
    assert (tmp_path / "new" / "file").read_text() == "text"
    (tmp_path / "file").write_text("a file")
    write_briefly(tmp_path / "file" / "file", "text")
