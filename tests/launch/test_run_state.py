"""A run's state, from everything that its directory and the queue can hold."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from run_files import (
    NOW,
    job,
    make_spec,
    row,
    steps,
    write_attempt,
    write_beat,
    write_metrics,
    write_status,
)
from typer.testing import CliRunner

from piip_scale.cli import jobs as command
from piip_scale.cli.app import app
from piip_scale.errors import RunError, SlurmError
from piip_scale.launch import control
from piip_scale.launch import queue as slurm_queue
from piip_scale.launch.control import requeue_run, stop_run
from piip_scale.launch.report import read_reported, report_page
from piip_scale.launch.run_state import state_of
from piip_scale.launch.runs import describe, find_runs, read_run, refuse_active
from piip_scale.launch.spec import JobFiles, Request, load_request, save_request
from piip_scale.run.ending import Ending


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    make_spec(folder)
    return folder


def ended(end, decision, cause="", ago_s=50.0):
    return {
        "end": end,
        "decision": decision,
        "ending": Ending(cause=cause),
        "why": "so it was",
        "ended_unix_s": NOW - ago_s,
    }


@pytest.mark.parametrize(
    ("last", "status", "state"),
    [
        (ended("stopped", "finish", "user"), "stopped", "stopped"),
        # Stopped before it began to train: the status is of the attempt before, or of none.
        (ended("stopped", "finish", "user"), "running", "stopped"),
        (ended("stopped", "finish", "user"), None, "stopped"),
        (ended("crashed", "finish", "user"), "failed", "stopped"),
        (ended("stopped", "finish", "cancel"), "stopped", "cancelled"),
        (ended("crashed", "finish", "cancel"), "running", "cancelled"),
        (ended("preflight", "give_up"), "stopped", "given-up"),
        (ended("preflight", "give_up"), "running", "given-up"),
        (ended("crashed", "give_up"), "failed", "given-up"),
        (ended("cut", "give_up"), None, "given-up"),
        (ended("done", "finish"), "done", "done"),
        # It waited for its next attempt and is no longer in the queue.
        (ended("stopped", "requeue", "time limit"), "stopped", "cancelled"),
        # Its supervisor died between two attempts, in one, or before its ranks began.
        (ended("crashed", "restart"), "failed", "lost"),
        ({}, "running", "lost"),
        ({}, "stopped", "lost"),
        ({}, None, "lost"),
    ],
)
def test_out_of_the_queue_the_last_decision_makes_the_state(run_dir, last, status, state):
    if status:
        write_status(run_dir, status, 7, "as the training said", seconds_ago=200.0)
    write_attempt(run_dir, **last)
    found = row(run_dir)
    assert found.state == state
    assert found.event
    assert (found.images_per_second, found.eta_s) == (None, None)


def test_a_training_by_hand_after_the_job_speaks_for_itself(run_dir):
    write_attempt(run_dir, **ended("crashed", "give_up", ago_s=90.0))
    write_status(run_dir, "stopped", 9, "stopped as asked", seconds_ago=1.0)
    assert (row(run_dir).state, row(run_dir).event) == ("stopped", "stopped as asked")


def test_where_the_queue_cannot_be_asked_nothing_is_called_cancelled(run_dir):
    write_attempt(run_dir, **ended("stopped", "requeue", "time limit"))
    assert describe(read_run(run_dir, None)).state == "waiting"
    assert describe(read_run(run_dir, [])).state == "cancelled"


def test_a_job_that_was_cancelled_before_it_began(run_dir):
    submitted = JobFiles(run_dir).submitted
    submitted.write_text('{"job": "12", "unix_time_s": 1}\n')
    # The queue may have been read before.
    assert row(run_dir).state == "submitted"
    os.utime(submitted, (NOW - 100, NOW - 100))
    assert (row(run_dir).state, "left the queue" in row(run_dir).event) == ("cancelled", True)
    assert describe(read_run(run_dir, None)).state == "submitted"
    save_request(run_dir, Request(action="stop", unix_time_s=NOW, user="ann"))
    assert (row(run_dir).state, row(run_dir).event) == ("cancelled", "taken out of the queue by ann")


def test_one_that_was_taken_out_of_the_queue_by_its_user_is_stopped(run_dir):
    write_status(run_dir, "stopped", 7, "x", seconds_ago=200.0)
    write_attempt(run_dir, **ended("stopped", "requeue", "time limit"))
    save_request(run_dir, Request(action="stop", unix_time_s=NOW, user="ann"))
    assert (row(run_dir).state, row(run_dir).event) == ("stopped", "taken out of the queue by ann")


@pytest.mark.parametrize(
    ("queued", "last", "request_action", "state", "event"),
    [
        ({"state": "PENDING", "reason": "BeginTime"}, {}, None, "queued", "waits (BeginTime)"),
        ({"state": "PENDING", "reason": "JobHeldUser"}, {}, None, "held", "waits (JobHeldUser)"),
        ({"state": "REQUEUE_HOLD", "reason": "x"}, ended("cut", "requeue"), None, "held", "waits (x) after: so it was"),
        ({"state": "SPECIAL_EXIT", "reason": "x"}, {}, None, "held", "waits (x)"),
        ({"state": "SUSPENDED"}, {}, None, "suspended", "Slurm calls job 12 suspended"),
        ({"state": "COMPLETING"}, {}, None, "completing", "Slurm calls job 12 completing"),
        ({}, {}, None, "running", "starting, attempt 0"),
        ({}, {}, "stop", "stopping", "stop was asked for by ann"),
        ({}, {}, "requeue", "stopping", "requeue was asked for by ann"),
        # Between two attempts nothing trains.
        ({}, ended("crashed", "restart"), None, "waiting", "so it was"),
        ({}, ended("crashed", "give_up"), None, "given-up", "so it was"),
    ],
)
def test_in_the_queue(run_dir, queued, last, request_action, state, event):
    write_attempt(run_dir, **last)
    if request_action:
        save_request(run_dir, Request(action=request_action, unix_time_s=NOW, user="ann"))
    found = row(run_dir, [job(run_dir, **queued)])
    assert found.state == state
    assert event in found.event


def test_a_request_of_an_earlier_job_stops_nothing(run_dir):
    save_request(run_dir, Request(action="stop", unix_time_s=NOW - 500))
    write_attempt(run_dir)
    assert row(run_dir, [job(run_dir)]).state == "running"


@pytest.mark.parametrize(
    ("changes", "state", "event"),
    [
        ({}, "running", ""),
        ({"waiting_s": 40.0}, "running", ""),
        ({"waiting_s": 300.0}, "stalled", "computing for 5m"),
        ({"waiting_s": 300.0, "phase": "waiting for data"}, "stalled", "waiting for data for 5m"),
        # An evaluation or a save has a limit of its own.
        ({"waiting_s": 300.0, "phase": "evaluating", "limit_s": 3600.0}, "running", "evaluating for 5m"),
        ({"waiting_s": 3.0, "phase": "evaluating", "limit_s": 3600.0}, "running", ""),
        ({"waiting_s": 300.0, "phase": "evaluating", "limit_s": 60.0}, "stalled", "evaluating"),
        # No heartbeat either: the process stands still, or its node.
        ({"unix_time_s": NOW - 90}, "stalled", "no sign of rank 0"),
        # Of the attempt before.
        ({"unix_time_s": NOW - 900}, "running", ""),
    ],
)
def test_a_run_that_stands_still_is_not_running(run_dir, changes, state, event):
    write_status(run_dir, "running", 40)
    write_metrics(run_dir, [{"step": 1, "kind": "start", "total_steps": 100}, *steps(1, 40)])
    write_attempt(run_dir)
    now_s = time.time()
    write_beat(run_dir, **{"host": "elsewhere", "step": 40, "unix_time_s": now_s} | changes)
    found = describe(read_run(run_dir, [job(run_dir)]), now_s)
    assert found.state == state
    assert event in found.event
    # Neither a rate nor a time to go of what makes no steps.
    stands = state == "stalled" or "evaluating" in event
    assert (found.eta_s is None) == (found.images_per_second is None) == stands


def test_a_local_run_whose_process_is_stopped_stands_still(run_dir):
    write_status(run_dir, "running", 40)
    write_beat(run_dir, unix_time_s=NOW)
    run = read_run(run_dir, [])
    assert state_of(run, alive=True, now_unix_s=NOW + 1) == "running"
    assert state_of(run, alive=True, now_unix_s=NOW + 100) == "stalled"


def barred(monkeypatch, folder: Path) -> None:
    """As for somebody without the right to look into a folder; root has it always."""
    stat, scandir = Path.stat, os.scandir

    def refuse(path) -> None:
        if Path(path) == folder or folder in Path(path).parents:
            raise PermissionError(13, "Permission denied", str(path))

    def barred_stat(self, **more):
        if folder in self.parents:
            refuse(self)
        return stat(self, **more)

    monkeypatch.setattr(Path, "stat", barred_stat)
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) or scandir(path))


def test_a_folder_that_cannot_be_looked_into_hides_no_others(tmp_path, monkeypatch):
    for name in ("a", "b", "c", "sweep/0", "sweep/1"):
        write_status(tmp_path / name, "done", 1)
    for folder in (tmp_path / "b", tmp_path / "sweep" / "0"):
        barred(monkeypatch, folder)
    rows = {str(path.relative_to(tmp_path)): row(path) for path in find_runs([tmp_path])}
    assert {name: found.state for name, found in rows.items()} == {
        "a": "done", "b": "unreadable", "c": "done", "sweep/0": "unreadable", "sweep/1": "done"
    }  # fmt: skip
    assert "Permission denied" in rows["b"].event


@pytest.mark.parametrize("name", ["status.json", "job/spec.json", "job/attempts.jsonl", "job/request.json"])
def test_a_file_that_cannot_be_read_is_a_line_and_no_end(run_dir, name):
    write_status(run_dir, "done", 1)
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).mkdir()
    assert row(run_dir).state == "unreadable"
    assert "cannot read" in row(run_dir).event


def test_linked_runs_are_there_once_under_their_own_name(tmp_path):
    write_status(tmp_path / "runs" / "z", "done", 1)
    write_status(tmp_path / "far" / "away", "done", 1)
    links = {"latest": "z", "again": "latest", "far": tmp_path / "far" / "away", "loop": ".", "gone": "nowhere"}
    for name, target in links.items():
        (tmp_path / "runs" / name).symlink_to(target)
    (tmp_path / "other").symlink_to("runs")
    assert find_runs([tmp_path / "runs"]) == [tmp_path / "runs" / "far", tmp_path / "runs" / "z"]
    assert len(find_runs([tmp_path / "runs", tmp_path / "other", tmp_path / "far"])) == 2


HOSTILE = "[red]a[/red] \x1b[31m it's\nso \udce9"


def test_names_and_errors_from_outside_are_shown_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "has_slurm", lambda: False)
    run = tmp_path / "[bold]x[/bold] \x1b[7m"
    write_status(run, "failed", 3, HOSTILE)
    done = CliRunner().invoke(app, ["jobs", "--runs", str(tmp_path)])
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 2
    assert "[red]a[/red] \\x1b[31m it's\\nso \\udce9" in done.stdout
    assert "[bold]x[/bold] \\x1b[7m" in done.stdout
    as_json = CliRunner().invoke(app, ["jobs", "--json", "--runs", str(tmp_path)])
    assert json.loads(as_json.stdout)["event"] == HOSTILE


def calls_of(monkeypatch, name, error=None):
    calls = []

    def note(*given):
        calls.append(given[0].name)
        if error:
            raise error

    monkeypatch.setattr(slurm_queue, name, note)
    return calls


def test_a_job_that_is_ending_can_be_stopped_and_stays_away(run_dir, monkeypatch):
    cancelled = calls_of(monkeypatch, "cancel", SlurmError("Job/step already completing or completed"))
    signalled = calls_of(monkeypatch, "signal_batch")
    queue = [job(run_dir, "COMPLETING")]
    assert "job 12 is ending already" in stop_run(read_run(run_dir, queue), queue)
    assert (cancelled, signalled, load_request(run_dir).action) == (["12"], [], "stop")


@pytest.mark.parametrize("returns", [False, True])
def test_a_job_that_is_ending_is_in_nobodys_way_unless_it_returns(run_dir, monkeypatch, returns):
    monkeypatch.setattr(control, "resend", lambda spec: 77)
    write_attempt(run_dir, **ended("stopped", "requeue" if returns else "finish"))
    queue = [job(run_dir, "COMPLETING")]
    if returns:
        with pytest.raises(RunError, match=r"has job 12 \(completing\)"):
            refuse_active([run_dir], run_dir / "job/train.sbatch", queue)
        assert "on its way back" in requeue_run(read_run(run_dir, queue))
    else:
        refuse_active([run_dir], run_dir / "job/train.sbatch", queue)
        assert "as job 77" in requeue_run(read_run(run_dir, queue))


ODD_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e300", "1e12", "9" * 400, "true", '"x"', "[]", "null"]


@pytest.mark.parametrize("odd", ODD_NUMBERS)
def test_what_is_no_measurement_gives_no_time_to_go(run_dir, odd):
    write_status(run_dir, "running", 1)
    write_attempt(run_dir)
    write_beat(run_dir, host="elsewhere", step=2)
    start = '{"step": 1, "kind": "start", "total_steps": 1000000}'
    names = ("time/step_ms", "time/data_wait_ms", "loss/total", "run/goodput", "ranks/slowest_own_ms", "eval/box_ap")
    values = ", ".join(f'"{name}": {odd}' for name in ("throughput/images_per_second", *names))
    lines = [f'{{"step": 2, "kind": "{kind}", {values}}}' for kind in ("step", "evaluation")]
    (run_dir / "metrics.jsonl").write_text("\n".join([start, *lines, f'{{"step": {odd}, "kind": "step"}}']))
    found = row(run_dir, [job(run_dir)])
    assert (found.state, found.eta_s) == ("running", None)
    assert command.table([found], 100)
    assert report_page([read_reported(found)])


DEEP = "[" * 100_000
ODD = {"attempt": 0, "job_id": 1, "restart_count": 0, "nodes": ["n1"], "started_unix_s": 1.0}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("status.json", DEEP),
        ("status.json", '{"state": "done", "step": 1, "ending": {"line": 5}}'),
        ("job/spec.json", DEEP),
        ("job/request.json", DEEP),
        ("job/attempts.jsonl", DEEP),
        *[
            ("job/attempts.jsonl", json.dumps(ODD | odd))
            for odd in (
                {"started_unix_s": "x"},
                {"attempt": None},
                {"ended_unix_s": "x", "end": "done"},
                {"end": "odd"},
                {"decision": "odd"},
                {"ending": []},
                {"ending": {"cause": 3}},
                {"ending": {"step": "x"}},
                {"last_step": [], "end": "done"},
            )
        ],
        ("job/submitted.jsonl", DEEP),
        ("metrics.jsonl", DEEP),
        ("metrics.jsonl", '{"step": 1, "kind": "step", "time/step_ms": "x", "throughput/images_per_second": []}'),
        ("heartbeats/rank_0.json", DEEP),
        ("heartbeats/rank_0.json", "[]"),
    ],
)
def test_no_file_of_a_run_ends_the_list(run_dir, name, content):
    write_status(run_dir, "running", 1)
    write_attempt(run_dir, **ended("stopped", "finish"))
    (run_dir / "heartbeats").mkdir()
    (run_dir / name).write_text(content)
    for queue in ([], [job(run_dir)], None):
        assert describe(read_run(run_dir, queue)).state
