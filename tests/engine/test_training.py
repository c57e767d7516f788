"""Whole trainings in real processes: done, killed, stopped, failed, resumed."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import preloaded
import psutil
import pytest
import torch
from save_killer import MOMENTS_OF_ALL, MOMENTS_OF_MAIN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from piip_scale.checkpoint.averages import AVERAGE
from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.run.bad_steps import bad_steps, read_bad_step
from piip_scale.run.run_dir import RunDirectory
from piip_scale.telemetry.jsonl import read_events

WORKER = Path(__file__).with_name("tiny_worker.py")
STEPS = 8
AVERAGED = ("--ema-decay", "0.9")
# Neither a compiler nor ninja is there, as on a machine where only wheels were installed.
WITHOUT_COMPILERS = os.environ | {"PATH": ""}


def start(run_dir: Path, *options: str, **settings) -> preloaded.Python:
    return preloaded.Python([WORKER, run_dir, "--launch", "2", *options], stderr=subprocess.STDOUT, **settings)


def start_anew(run_dir: Path, *options: str, **settings) -> subprocess.Popen:
    """As a user's shell does: Python starts, and starts one for each rank."""
    command = [sys.executable, str(WORKER), str(run_dir), "--launch", "2", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)


def train(run_dir: Path, *options: str, **settings) -> tuple[int, str]:
    process = start(run_dir, *options, **settings)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def wait_for_step(run_dir: Path, step: int, process) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        status = RunDirectory(run_dir).status()
        if status and status.step >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}: {process.communicate()[0]}")


def records(run_dir: Path, kind: str = "step") -> dict[int, dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == kind}


def losses(run_dir: Path) -> dict[int, tuple]:
    keys = ("loss/loss_box", "loss/loss_score", "train/grad_norm", "train/lr")
    return {step: tuple(record[key] for key in keys) for step, record in records(run_dir).items()}


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: master weights by name, the others as the sharded files hold them."""
    checkpoint = run_dir / "checkpoints" / f"step_{step:08d}"
    found = dict(ZeroCheckpoint(checkpoint))
    if (checkpoint / AVERAGE).exists():
        found |= {f"average of {name}": value for name, value in ZeroCheckpoint(checkpoint, averaged=True).items()}

    def walk(prefix: str, value) -> None:
        # In the flat groups, a slice's padding is whatever the memory held before.
        if isinstance(value, torch.Tensor) and "fp32_flat_groups" not in prefix:
            found[prefix] = value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in items:
                walk(f"{prefix}/{key}", inner)

    for file in sorted(checkpoint.rglob("*_states.pt")):
        walk(file.name, torch.load(file, weights_only=False))
    return found


def assert_bitwise_equal(run_dir: Path, expected: Path) -> None:
    assert losses(run_dir) == losses(expected)
    found, wanted = tensors(run_dir, STEPS), tensors(expected, STEPS)
    assert found.keys() == wanted.keys()
    assert any("exp_avg_sq" in name for name in found)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """Started by torchrun, which is forked itself and starts a new Python for each rank."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    preloaded.run([*torchrun, WORKER, run_dir, *AVERAGED], env=WITHOUT_COMPILERS, check=True)
    return run_dir


@pytest.fixture(scope="module")
def uninterrupted_bf16(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    code, output = train(run_dir, "--precision", "bf16")
    assert code == 0, output
    return run_dir


def test_a_run_leaves_status_metrics_and_checkpoints(uninterrupted):
    assert RunDirectory(uninterrupted).status().state == "done"
    assert sorted(records(uninterrupted)) == list(range(1, STEPS + 1))
    assert sorted(records(uninterrupted, "evaluation")) == [4, 8]
    (start,) = records(uninterrupted, "start").values()
    phases = ("imports", "join", "build", "weights", "shard", "resume", "disk", "first_batch", "first_step")
    seconds = [f"start/{phase}_seconds" for phase in phases]
    assert list(start) == ["step", "kind", *seconds, "checkpoint/expected_seconds", "total_steps"]
    assert start["total_steps"] == STEPS
    assert sorted(path.name for path in (uninterrupted / "checkpoints").glob("step_*")) == [
        "step_00000006",
        "step_00000008",
    ]
    events = EventAccumulator(str(uninterrupted / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "trouble"),
    [
        (1, ("--trouble", "kill:1:10")),
        *((0, ("--kill-save", f"{moment}:0:6")) for moment in MOMENTS_OF_MAIN),
        *((rank, ("--kill-save", f"{moment}:{rank}:6")) for moment in MOMENTS_OF_ALL for rank in (0, 1)),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_killed_at_any_moment_and_resumed_is_bit_for_bit_the_whole_run(uninterrupted_bf16, tmp_path, rank, trouble):
    # One checkpoint is kept, so that the second save prunes.
    options = ("--precision", "bf16", "--keep", "1")
    code, output = train(tmp_path / "run", *options, *trouble)
    assert code == 1
    assert f"rank {rank} was killed by SIGKILL" in output
    assert RunDirectory(tmp_path / "run").status().state == "failed"
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=1)
    store.validate(store.latest())
    code, output = train(tmp_path / "run", *options, "--resume")
    assert code == 0, output
    assert_bitwise_equal(tmp_path / "run", uninterrupted_bf16)
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", f"step_{STEPS:08d}"]


def test_a_signal_to_one_rank_stops_all_at_one_step_and_the_run_goes_on_bit_for_bit(uninterrupted, tmp_path):
    """Started by us here, and by torchrun there."""
    code, output = train(tmp_path / "run", *AVERAGED, "--trouble", "signal:1:8")
    assert code == 130, output
    assert output.count("stopped as asked after step 5 of 8") == 1
    assert "--resume" in output
    status = RunDirectory(tmp_path / "run").status()
    assert (status.state, status.step) == ("stopped", 5)
    code, output = train(tmp_path / "run", *AVERAGED, "--resume")
    assert code == 0, output
    assert_bitwise_equal(tmp_path / "run", uninterrupted)
    scores = [records(run, "evaluation")[STEPS]["eval/mean_score"] for run in (tmp_path / "run", uninterrupted)]
    assert scores[0] == scores[1]
    assert ZeroCheckpoint(uninterrupted / "checkpoints" / f"step_{STEPS:08d}", averaged=True).num_updates == STEPS


def test_a_used_directory_is_refused_in_one_line(uninterrupted):
    code, output = train(uninterrupted)
    assert code == 1
    assert output.count("holds a run (done at step 8)") == 1
    assert RunDirectory(uninterrupted).status().state == "done"


def test_ctrl_c_saves_and_stops_every_rank(tmp_path):
    process = start(tmp_path / "run", "--steps", "500", "--slow", "0.05")
    wait_for_step(tmp_path / "run", 2, process)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    assert output.count("stopped as asked") == 1
    status = RunDirectory(tmp_path / "run").status()
    assert status.state == "stopped"
    assert (tmp_path / "run" / "checkpoints" / f"step_{status.step:08d}" / "training.json").exists()
    assert not any(rank.is_running() for rank in ranks)


DEAF = """
import os, pathlib, signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
(pathlib.Path(sys.argv[1]) / f"rank_{os.environ['RANK']}").touch()
time.sleep(3600)
"""
LAUNCHER = """
import sys
from piip_scale.engine.local_launch import launch_local
from piip_scale.run.run_dir import RunDirectory
launch_local(2, [sys.executable, "-c", sys.argv[1], sys.argv[2]], RunDirectory(sys.argv[2]))
"""


def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path):
    """Not even one that hears no signal."""
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, DEAF, tmp_path])
    while not all((tmp_path / f"rank_{rank}").exists() for rank in range(2)):
        assert process.poll() is None
        time.sleep(0.05)
    ranks = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=240)
    assert not alive
    assert len(ranks) == 2


@pytest.mark.slow
def test_no_rank_that_trains_outlives_a_launcher_that_is_killed(tmp_path):
    process = start_anew(tmp_path / "run", "--steps", "500", "--slow", "0.05", env=WITHOUT_COMPILERS)
    wait_for_step(tmp_path / "run", 1, process)
    ranks = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=240)
    _, alive = psutil.wait_procs(ranks, timeout=240)
    assert not alive


def test_an_error_is_told_once_with_its_rank_and_ends_all(tmp_path):
    code, output = train(tmp_path / "run", "--trouble", "raise:1:4")
    assert code == 2
    assert output.count("sample is broken: got 'shard_3.tar'") == 1
    assert "[rank 1]" in output
    assert "Traceback" not in output
    status = RunDirectory(tmp_path / "run").status()
    assert (status.state, status.step) == ("failed", 2)
    assert "Traceback" in (tmp_path / "run" / "errors" / "rank_1.txt").read_text()


def test_an_unforeseen_error_names_the_file_with_its_traceback(tmp_path):
    code, output = train(tmp_path / "run", "--trouble", "crash:0:4")
    assert code == 1
    told = [line for line in output.splitlines() if "ValueError: an unforeseen thing" in line]
    assert len(told) == 1
    assert str(tmp_path / "run" / "errors" / "rank_0.txt") in told[0]


def test_a_run_that_diverges_stops_by_itself(tmp_path):
    code, output = train(tmp_path / "run", "--lr", "1e30", "--steps", "20")
    assert code == 1
    assert output.count("was not finite in 2 steps in a row") == 1
    run = RunDirectory(tmp_path / "run")
    steps = bad_steps(run)
    assert steps == [steps[0], steps[0] + 1]
    for step in steps:
        kept = read_bad_step(run, step)
        assert not math.isfinite(kept.grad_norm)
        # Each step is of two micro-batches, on two ranks.
        micros = [(step - 1) * 2, (step - 1) * 2 + 1]
        assert [rank.keys for rank in kept.ranks] == [
            [[f"{micro * 2 + rank}_0", f"{micro * 2 + rank}_1"] for micro in micros] for rank in (0, 1)
        ]
        (event,) = [text for at, text in read_events(run.metrics) if at == step and "not applied" in text]
        assert event == f"step not applied: {kept.reason}; see bad_steps/step_{step:08d}.json"


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_disk_that_fills_while_saving_is_one_line_and_leaves_no_checkpoint(tmp_path):
    code, output = train(tmp_path / "run", "--save-every", "1", preexec_fn=small_files_only)
    assert code == 2, output
    told = [line for line in output.splitlines() if "error" in line]
    assert len(told) == 1
    assert "cannot write checkpoint" in told[0]
    assert list((tmp_path / "run" / "checkpoints").glob("step_*")) == []


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting needs root: {done.stderr.strip()}")


@pytest.fixture
def checkpoints(tmp_path):
    """A folder of checkpoints that is a disk of its own."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("room_kib", [0, 40, 120, 200, 300])
def test_a_disk_that_fills_in_a_later_save_loses_nothing_and_the_run_goes_on(uninterrupted_bf16, checkpoints, room_kib):
    options = ("--precision", "bf16", "--keep", "1")
    process = start(checkpoints.parent, *options, "--slow", "0.3")
    wait_for_step(checkpoints.parent, 4, process)
    # What is there stays, and so much more fits: the next save would take 320 KiB.
    mount("-o", f"remount,size={psutil.disk_usage(str(checkpoints)).used // 1024 + room_kib}k", str(checkpoints))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2, output
    assert output.count("No space left on device") == 1, output
    store = CheckpointStore(checkpoints, keep=1)
    assert store.steps() == [3]
    store.validate(store.latest())
    mount("-o", "remount,size=64m", str(checkpoints))
    code, output = train(checkpoints.parent, *options, "--resume")
    assert code == 0, output
    assert_bitwise_equal(checkpoints.parent, uninterrupted_bf16)


@pytest.mark.slow
def test_a_disk_that_turns_read_only_loses_nothing_and_the_run_goes_on(uninterrupted_bf16, checkpoints):
    options = ("--precision", "bf16", "--keep", "1")
    process = start(checkpoints.parent, *options, "--slow", "0.3")
    wait_for_step(checkpoints.parent, 4, process)
    mount("-o", "remount,ro", str(checkpoints))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2, output
    assert output.count("Read-only file system") == 1, output
    store = CheckpointStore(checkpoints, keep=1)
    assert store.latest() == store.path(3)
    mount("-o", "remount,rw", str(checkpoints))
    code, output = train(checkpoints.parent, *options, "--resume")
    assert code == 0, output
    assert_bitwise_equal(checkpoints.parent, uninterrupted_bf16)
