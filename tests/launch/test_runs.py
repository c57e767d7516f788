"""How runs are told of, from directories made as trainings and jobs leave them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_files import NOW, attempt, beat, job, make_spec, row, steps, write_metrics, write_status

from piip_scale.cli.jobs import table
from piip_scale.errors import RunError
from piip_scale.launch.attempts import History
from piip_scale.launch.control import requeue_run, stop_run
from piip_scale.launch.queue import parse_queue
from piip_scale.launch.run_metrics import read_pace
from piip_scale.launch.runs import find_runs, is_alive, read_run, refuse_active
from piip_scale.launch.spec import JobFiles, load_request, load_spec
from piip_scale.launch.words import duration
from piip_scale.run.ending import Ending
from piip_scale.run.heartbeat import write_beat


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "runs" / "it's a run"
    folder.mkdir(parents=True)
    return folder


def test_a_running_job_tells_step_pace_and_time_to_go(run_dir):
    make_spec(run_dir)
    write_status(run_dir, "running", 40)
    start = {"step": 1, "kind": "start", "start/imports_seconds": 1.0, "total_steps": 100}
    write_metrics(run_dir, [start, *steps(1, 41), {"step": 41, "kind": "event", "text": "saved step_00000040"}])
    History(JobFiles(run_dir).attempts).write(attempt())
    found = row(run_dir, [job(run_dir)])
    assert (found.state, found.job, found.step, found.total_steps) == ("running", "12", 41, 100)
    assert found.images_per_second == 16.0
    assert found.eta_s == pytest.approx((100 - 41) * 0.5)
    assert found.event == "saved step_00000040"
    lines = table([found], None)
    assert lines[0].split() == ["RUN", "STATE", "SEEN", "JOB", "STEP", "IMAGES/S", "ETA", "RESTARTS", "LAST", "EVENT"]
    assert "41/100  16.0      30s  0         saved step_00000040" in lines[1]
    assert [len(line) for line in table([found], 20)] == [20, 20]


@pytest.mark.parametrize(
    ("status", "queued", "expected"),
    [
        (None, "PENDING", ("queued", "waits (Priority)")),
        (("stopped", "x"), "PENDING", ("queued", "waits (Priority) after: stopped by time limit")),
        (("running", ""), "COMPLETING", ("completing", "stopped by time limit")),
        (("stopped", "stopped as asked"), None, ("stopped", "stopped as asked")),
        (("failed", "rank 1 was killed"), None, ("failed", "rank 1 was killed")),
        (("done", ""), None, ("done", "stopped by time limit")),
        (("done", ""), "COMPLETING", ("done", "stopped by time limit")),
        (
            ("running", ""),
            None,
            ("lost", "ended without a report; it goes on with piip-scale jobs requeue, or --resume"),
        ),
        (None, None, ("submitted", "was submitted, has not started")),
    ],
)
def test_queue_and_files_together_make_the_state(run_dir, status, queued, expected):
    make_spec(run_dir)
    if status:
        write_status(run_dir, status[0], 7, status[1])
        History(JobFiles(run_dir).attempts).write(attempt(end="stopped", why="stopped by time limit"))
    found = row(run_dir, [job(run_dir, queued)] if queued else [])
    assert (found.state, found.event) == expected
    assert (found.images_per_second, found.eta_s) == (None, None)


def test_restarts_are_attempts_after_the_first(run_dir):
    make_spec(run_dir)
    history = History(JobFiles(run_dir).attempts)
    for number in range(3):
        history.write(attempt(number))
        history.write(attempt(number, end="crashed", ending=Ending(line="rank 1 was killed"), why="requeued: progress"))
    found = row(run_dir)
    assert (found.restarts, found.job) == (2, "12")


def test_restarts_by_hand_count_too(run_dir):
    write_status(run_dir, "stopped", 7)
    for content, restarts in (('{"attempt": 3}', 2), ("[", 0)):
        (run_dir / "gpu_time.json").write_text(content)
        assert row(run_dir).restarts == restarts


def test_the_pace_of_an_attempt_before_is_not_told(run_dir):
    make_spec(run_dir)
    write_status(run_dir, "stopped", 40)
    write_metrics(run_dir, steps(1, 40))
    os.utime(run_dir / "metrics.jsonl", (NOW - 500, NOW - 500))
    History(JobFiles(run_dir).attempts).write(attempt(1))
    found = row(run_dir, [job(run_dir)])
    assert (found.state, found.images_per_second, found.event) == ("running", None, "starting, attempt 1")


def test_a_job_that_ended_before_it_trained_points_to_its_log(run_dir):
    make_spec(run_dir)
    (run_dir / "job" / "log-12.txt").write_text("module: not found\n")
    assert (row(run_dir).state, row(run_dir).event) == ("failed", "ended before it began to train: see jobs logs")


def test_broken_files_are_a_line_and_no_end(run_dir):
    (run_dir / "status.json").write_text("{")
    assert row(run_dir).state == "unreadable"
    assert "status.json cannot be read" in row(run_dir).event
    write_status(run_dir, "running", 3)
    JobFiles(run_dir).folder.mkdir()
    JobFiles(run_dir).spec.write_text('{"name": 1}')
    assert "spec.json: key name: got 1" in row(run_dir).event


def test_runs_are_found_in_folders_and_sweeps_and_not_in_themselves(tmp_path):
    runs = tmp_path / "runs"
    for name in ("a", "sweep/0-lr=1", "sweep/1-lr=2", "deep/er/run", "deep/er/too/far", ".hidden"):
        write_status(runs / name, "done", 1)
    write_status(runs / "a" / "checkpoints" / "x", "done", 1)
    (runs / "sweep" / "job").mkdir()
    names = [str(path.relative_to(runs)) for path in find_runs([runs])]
    assert names == ["a", "deep/er/run", "sweep/0-lr=1", "sweep/1-lr=2"]
    assert find_runs([runs / "a", runs / "a", tmp_path / "none"]) == [runs / "a"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"not json\n", b'{"step": 1, "kind": "ev', b'[1]\n{"kind": "step"}\n', b"\xff\xfe\n"],
)
def test_metrics_that_tell_nothing_are_no_pace(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    pace = read_pace(tmp_path)
    assert (pace.step, pace.total_steps, pace.seconds_per_step, pace.eta_s(0)) == (0, None, None, None)


def test_the_newest_start_counts_however_long_the_file(tmp_path):
    starts = [{"step": step, "kind": "start", "total_steps": total} for step, total in ((1, 7), (2, 9000))]
    write_metrics(tmp_path, [starts[0], starts[1], *steps(3, 3000)])
    assert (tmp_path / "metrics.jsonl").stat().st_size > 1 << 17
    pace = read_pace(tmp_path)
    assert (pace.step, pace.total_steps) == (3000, 9000)


def test_the_queue_is_read_with_any_command():
    text = (
        "12|12|N/A|RUNNING|None|1:00|n[1-2]|/runs/it's a | b/job/train.sbatch\n"
        "40|31|2|PENDING|JobArrayTaskLimit|1:00||/runs/sw/job/train.sbatch\n"
        "slurm_load_jobs error: x\n13|13\n"
    )
    first, task = parse_queue(text)
    assert (first.name, first.array_task, first.command) == ("12", None, "/runs/it's a | b/job/train.sbatch")
    assert (task.name, task.array_task, task.is_waiting, task.nodes) == ("31_2", 2, True, "")


def test_a_task_of_a_sweep_belongs_to_its_run_alone(tmp_path):
    script = tmp_path / "sw/job/train.sbatch"
    runs = [tmp_path / "sw" / name for name in ("0", "1")]
    for task, folder in enumerate(runs):
        make_spec(folder, script=script, array_task=task)
    queue = [job(tmp_path / "sw", name="31_1", array_task=1)]
    assert [row(folder, queue).state for folder in runs] == ["submitted", "running"]


def test_a_process_is_known_by_more_than_its_number():
    assert is_alive(beat(), NOW)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert not is_alive(beat(pid=child.pid), time.time())
    # This process is younger than that heartbeat.
    assert not is_alive(beat(unix_time_s=time.time() - 1e6), time.time())
    assert is_alive(beat(host="elsewhere"), time.time())
    assert not is_alive(beat(host="elsewhere", unix_time_s=NOW - 1e3), time.time())
    assert not is_alive(None, NOW)


def test_a_local_run_is_stopped_by_signal(run_dir):
    code = "import signal, time\nprint(signal.sigwait([signal.SIGUSR2]).name, flush=True)"
    code = "import signal\nsignal.pthread_sigmask(0, [signal.SIGUSR2])\nprint('up', flush=True)\n" + code
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "up\n"
        write_status(run_dir, "running", 3)
        (run_dir / "heartbeats").mkdir()
        write_beat(run_dir / "heartbeats", beat(pid=child.pid))
        found = row(run_dir)
        assert (found.state, found.job) == ("running", f"{socket.gethostname()}:{child.pid}")
        assert f"asked process {child.pid} to save and stop" in stop_run(read_run(run_dir, []), [])
        assert child.communicate(timeout=240)[0] == "SIGUSR2\n"
    finally:
        child.kill()
    with pytest.raises(RunError, match="runs or waits"):
        stop_run(read_run(run_dir, []), [])
    assert row(run_dir).state == "lost"


def test_a_run_of_another_machine_is_left_alone(run_dir):
    write_status(run_dir, "running", 3)
    (run_dir / "heartbeats").mkdir()
    write_beat(run_dir / "heartbeats", beat(host="elsewhere", pid=1))
    with pytest.raises(RunError, match="runs on elsewhere"):
        stop_run(read_run(run_dir, []), [])


def test_what_cannot_be_requeued_says_why(run_dir):
    write_status(run_dir, "done", 9)
    with pytest.raises(RunError, match="is done, at step 9"):
        requeue_run(read_run(run_dir, []))
    write_status(run_dir, "stopped", 9)
    with pytest.raises(RunError, match="--resume"):
        requeue_run(read_run(run_dir, []))


def fake_slurm(folder, monkeypatch):
    """Commands that note how they were called."""
    folder.mkdir()
    for name in ("scancel", "scontrol", "sbatch"):
        path = folder / name
        path.write_text(
            f'#!/bin/sh\necho "{name} $@" >> {str(folder / "calls")!r}\n[ {name} = sbatch ] && echo 77 || true\n'
        )
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return lambda: (folder / "calls").read_text().splitlines()


def test_stopping_a_job_first_takes_away_what_follows(run_dir, tmp_path, monkeypatch):
    calls = fake_slurm(tmp_path / "bin", monkeypatch)
    make_spec(run_dir)
    queue = [job(run_dir), job(run_dir, "PENDING", name="13", job_id=13), job(tmp_path / "other", name="14", job_id=14)]
    told = stop_run(read_run(run_dir, queue), queue)
    assert told == "asked job 12 to save and stop, took job 13 out of the queue; piip-scale jobs shows when it has"
    assert calls() == ["scancel 13", "scancel --batch --signal=USR2 12"]
    assert load_request(run_dir).action == "stop"


def test_requeueing_depends_on_where_the_job_is(run_dir, tmp_path, monkeypatch):
    calls = fake_slurm(tmp_path / "bin", monkeypatch)
    spec = make_spec(run_dir)
    spec.script.write_text("#!/bin/bash\n")
    assert "save and wait" in requeue_run(read_run(run_dir, [job(run_dir)]))
    assert load_request(run_dir).action == "requeue"
    assert "waits already (Priority)" in requeue_run(read_run(run_dir, [job(run_dir, "PENDING")]))
    assert "was held" in requeue_run(read_run(run_dir, [job(run_dir, "PENDING", reason="JobHeldUser")]))
    assert "as job 77" in requeue_run(read_run(run_dir, []))
    assert calls() == [
        "scancel --batch --signal=USR2 12",
        "scontrol release 12",
        f"sbatch --parsable {spec.script}",
    ]
    assert row(run_dir).job == "77"


def test_a_spec_is_read_back_as_it_was(run_dir):
    spec = make_spec(run_dir, overrides=("a='b \"c\"'",), srun_options=("--mpi=none",), array_task=3)
    assert load_spec(run_dir) == spec
    assert load_spec(Path("/none")) is None


def test_what_is_trained_is_not_submitted_again(run_dir):
    script = run_dir / "job/train.sbatch"
    refuse_active([run_dir], script, [job(run_dir.parent / "other")])
    # Another run of the same sweep: submitting would replace the code that it waits to run.
    with pytest.raises(RunError, match="has job 31_7"):
        refuse_active([run_dir / "0"], script, [job(run_dir, "PENDING", name="31_7", array_task=7)])
    # Submitted by hand: its history tells whose it is.
    History(JobFiles(run_dir).attempts).write(attempt())
    with pytest.raises(RunError, match="has job 12"):
        refuse_active([run_dir], script, [job(run_dir, command="train.sbatch c.py")])
    write_status(run_dir, "running", 3)
    (run_dir / "heartbeats").mkdir()
    write_beat(run_dir / "heartbeats", beat())
    with pytest.raises(RunError, match=f"process {os.getpid()} on"):
        refuse_active([run_dir], script, [])
    write_status(run_dir, "stopped", 3)
    refuse_active([run_dir], script, [])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59, "59s"), (60, "1m"), (3599, "60m"), (3600, "1h 00m"), (86399, "23h 59m"), (90000, "1d 01h")],
)
def test_times_to_go_are_short(seconds, text):
    assert duration(seconds) == text
