"""Ranks that hang, stop or fail: everybody leaves within seconds, and the user reads one line."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import preloaded
import psutil
import pytest

from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.engine import watchdog
from piip_scale.engine.local_launch import launch_local
from piip_scale.engine.save_job import LAST_SECONDS, SaveFiles, SaveJob
from piip_scale.engine.watchdog import Watchdog, hang_error
from piip_scale.run.ending import Ending
from piip_scale.run.heartbeat import COMPUTING, WAITING, Beat, Heartbeat, write_node
from piip_scale.run.run_dir import RunDirectory
from piip_scale.world import World, held_port

WORKER = Path(__file__).with_name("tiny_worker.py")
HANG_S = 4.5


def finish(process: subprocess.Popen | preloaded.Python) -> tuple[int, str]:
    """Exit code and output."""
    try:
        # However busy the machine; without what is tested here ranks would stay for ten minutes or for ever.
        output, _ = process.communicate(timeout=240)
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
    return process.returncode, output


def launch(folder: Path, *options: str, **settings) -> preloaded.Python:
    return preloaded.Python([WORKER, folder / "run", *options], stderr=subprocess.STDOUT, cwd=folder, **settings)


SLOW = pytest.mark.slow


# The first of a node writes the heartbeats of the other.
@pytest.mark.parametrize(
    ("kind", "rank"),
    [("stop", 1), *(pytest.param(*cell, marks=SLOW) for cell in [("stop", 0), ("sleep", 1), ("lock", 1)])],
)
def test_a_rank_that_hangs_ends_the_run_with_all_stacks(kind, rank, tmp_path):
    options = ("--launch", "2", "--hang-minutes", str(HANG_S / 60), "--trouble", f"{kind}:{rank}:10")
    code, output = finish(launch(tmp_path, *options))
    assert code == 1, output
    told = [line for line in output.splitlines() if "error" in line]
    assert len(told) == 1
    assert f"nothing went on for 4.5 s: rank {rank} did not arrive (rank {rank}, process" in told[0]
    assert (f"{WAITING} after step 5" if kind == "sleep" else "which does not run, last seen ") in told[0]
    run = RunDirectory(tmp_path / "run")
    stacks = [(run.stacks / f"rank_{number}.txt").read_text() for number in (1 - rank, rank)]
    assert "in train_step" in stacks[0]
    # A process that was stopped is some moments further by the time it writes.
    assert ("in train_worker" if kind == "stop" else "in cause") in stacks[1]
    status = run.status()
    # The signal that asks for a stack may wake what slept, which then goes on until it is ended.
    assert (status.state, status.ending.reason) == ("failed", "hang")
    assert status.step >= 5


def test_what_may_be_slow_is_no_hang_and_a_signal_there_stops_the_run(tmp_path):
    options = ("--launch", "2", "--hang-minutes", "0.05", "--slow-evaluation", "4", "--trouble", "signal:1:eval")
    code, output = finish(launch(tmp_path, *options))
    assert code == 130, output
    assert "stopped as asked after step 4 of 8, and saved" in output
    run = RunDirectory(tmp_path / "run")
    assert (run.checkpoints / "step_00000004" / "training.json").exists()
    assert "evaluation left: asked to stop" in (run.path / "metrics.jsonl").read_text()
    assert list(run.stacks.iterdir()) == []


def test_without_a_launcher_that_kills_no_rank_outlives_anothers_error(tmp_path):
    # What NCCL does to ranks whose peer is gone: they never return. A rank that sleeps stands for it.
    ranks = []
    with held_port() as port:
        for rank in range(2):
            world = World(rank, 2, rank, 2, "127.0.0.1", port)
            environment = os.environ | world.as_environment()
            ranks.append(launch(tmp_path, "--trouble", "sleep:0:10,raise:1:10", env=environment))
        (code_0, output_0), (code_1, output_1) = map(finish, ranks)
    assert (code_0, code_1) == (2, 2)
    assert (output_0 + output_1).count("sample is broken") == 1
    assert "[rank 1]" in output_1


@pytest.mark.slow
def test_under_torchrun_an_error_is_told_once_and_ends_all(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [str(WORKER), str(tmp_path / "run"), "--trouble", "sleep:0:10,raise:1:10"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    code, output = finish(process)
    assert code != 0
    assert output.count("sample is broken") == 1
    assert RunDirectory(tmp_path / "run").status().state == "failed"


def test_a_full_device_is_one_line_with_the_plan_and_a_knob(tmp_path):
    code, output = finish(launch(tmp_path, "--launch", "2", "--trouble", "memory:1:4"))
    assert code == 1, output
    told = [line for line in output.splitlines() if "error" in line]
    assert len(told) == 1
    assert "the device of rank 1 ran out of memory; of its" in told[0]
    assert "this run was planned to need" in told[0]
    run = RunDirectory(tmp_path / "run")
    assert run.status().ending.reason == "out of device memory"
    details = (run.errors / "rank_1.txt").read_text()
    assert "Tried to allocate 20.00 MiB" in details
    assert "MiB on each of 2 GPUs, micro-batches of 2" in details
    assert str(run.errors / "rank_1.txt") in told[0]


def beat(rank: int, number: int, collectives: int, phase: str = COMPUTING) -> Beat:
    return Beat(rank, number, collectives, phase, 7, 600.0, 0.0, "node1", 40 + rank)


def test_the_line_names_ranks_behind_by_place_by_message_or_by_silence():
    def line(*beats: Beat, silent=(), num_ranks=4) -> str:
        error = hang_error({b.rank: b for b in beats}, silent, num_ranks, 600.0, "runs/a/stacks")
        assert (error.reason, error.exit_code) == ("hang", 1)
        assert all(f"rank {rank}" in error.line for rank in error.late_ranks[:1])
        return error.line

    ahead = [beat(rank, 9, 30) for rank in range(3)]
    behind = line(*ahead, beat(3, 8, 29, WAITING))
    assert "nothing went on for 10 min: rank 3 did not arrive" in behind
    assert f"process 43 on node1, {WAITING} after step 7" in behind
    assert "runs/a/stacks" in behind
    assert "rank 3 did not arrive" in line(*ahead, beat(3, 9, 29))
    assert "rank 3 did not arrive (rank 3 never started)" in line(*ahead)
    silent = line(*ahead, beat(3, 9, 30), silent=[3])
    assert "process 43 on node1, which does not run, last seen computing after step 7" in silent
    assert "no rank is behind the others (rank 0, process 40" in line(*ahead, beat(3, 9, 30))
    many = line(*ahead, num_ranks=12)
    assert "(rank 3 never started; rank 4 never started; rank 5 never started; rank 6 never started and 5 more)" in many


def test_an_older_process_leaves_its_rank_to_a_later_one(tmp_path, monkeypatch):
    run, left = RunDirectory(tmp_path), threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: left.set())
    now = time.time()
    earlier, later = replace(beat(0, 9, 30), started_unix_s=1.0), replace(beat(0, 9, 30), started_unix_s=now + 9)
    for found, leaves in ((None, False), (earlier, False), (later, True)):
        left.clear()
        if found:
            write_node(run.heartbeats, 0, [found])
        with Watchdog(run, World(), Heartbeat(step_limit_s=0.5, slow_limit_s=60)):
            assert left.wait(60 if leaves else 0.4) is leaves


@pytest.mark.parametrize(("saves", "patience_s"), [(False, 3), (True, LAST_SECONDS + 3)])
def test_a_rank_leaves_after_anothers_error_but_gives_any_ranks_save_its_time(tmp_path, monkeypatch, saves, patience_s):
    now_s, left = [100.0], []
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(os, "_exit", left.append)
    first = Ending(line="rank 1: broken", rank=1, exit_code=2)
    watched = Watchdog(RunDirectory(tmp_path), World(0, 2), Heartbeat())
    if saves:
        CheckpointStore(RunDirectory(tmp_path).checkpoints, keep=1).begin(8)
    for waited_s in (0.0, patience_s - 0.1):
        now_s[0] = 100.0 + waited_s
        watched._leave_after_others(first)
    assert left == []
    now_s[0] += 0.2
    watched._leave_after_others(first)
    assert left == [2]
    # The launcher's kill comes later than either.
    assert patience_s < inspect.signature(launch_local).parameters["grace_s"].default


def test_a_rank_that_fails_waits_for_the_other_ranks_parts_of_a_save(tmp_path):
    """Its end is theirs too, under srun --kill-on-bad-exit."""
    store = CheckpointStore(tmp_path, keep=1)
    store.begin(8)
    failing = SaveJob(store, 8, World(1, 2), SaveFiles(texts={"rank_1": "its part"}))
    assert failing.wait(240)
    assert not failing.wait_for_all(0.2)
    slow = SaveJob(store, 8, World(0, 2), SaveFiles(texts={"rank_0": "the other"}))
    assert failing.wait_for_all(240)
    assert store.steps() == [8]
    assert slow.wait(240)
    assert not store.is_saving()


def test_a_status_written_at_the_moment_of_the_failure_is_put_right_when_all_ranks_have_ended(tmp_path):
    run = RunDirectory(tmp_path)
    write_late = (
        "import sys; from dataclasses import replace; from piip_scale.run.run_dir import RunDirectory as R, Status;"
        "from piip_scale.errors import HangError; from piip_scale.run.failing import report_failure;"
        "run = R(sys.argv[1]); code = report_failure(run, 0, HangError('rank 1 did not arrive'), 5);"
        "run._write_status(Status('running', 6, None, 0)); sys.exit(code)"
    )
    run.write_status("running", 5)
    assert launch_local(1, [sys.executable, "-c", write_late, str(tmp_path)], run, grace_s=5) == 1
    status = run.status()
    assert (status.state, status.step, status.ending.reason) == ("failed", 6, "hang")


def test_limits_follow_the_phase():
    heartbeat = Heartbeat(step_limit_s=10, slow_limit_s=60)
    limits = {}
    for phase, step in [(WAITING, 5), (COMPUTING, 5), (WAITING, 6), (COMPUTING, 6), ("saving", 7), (WAITING, 7)]:
        heartbeat.mark(phase, step)
        limits[phase, step] = heartbeat.last.limit_s
    assert limits == {
        (WAITING, 5): 60,
        (COMPUTING, 5): 60,
        (WAITING, 6): 10,
        (COMPUTING, 6): 10,
        ("saving", 7): 60,
        (WAITING, 7): 10,
    }
    before = heartbeat.last
    heartbeat.again()
    assert (heartbeat.last.number, heartbeat.last.phase) == (before.number + 1, WAITING)
