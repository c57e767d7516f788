"""``jobs --watch``: a live table on a terminal, a table once and a word elsewhere."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from run_files import NOW, job, row, steps, write_attempt, write_beat, write_metrics, write_status
from typer.testing import CliRunner

from piip_scale.cli import jobs as command
from piip_scale.cli.app import app
from piip_scale.cli.watch import Ends, frame, watch_table
from piip_scale.launch.runs import Row, describe, read_run
from piip_scale.launch.spec import Request, save_request

ROW = Row(Path("runs/a"), "running", "12", 40, 100, 16.0, 30.0, 0, "saved", 2.0)


def test_without_a_terminal_it_prints_once_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "has_slurm", lambda: False)
    write_status(tmp_path / "run", "done", 3)
    done = CliRunner().invoke(app, ["jobs", "--watch", "--runs", str(tmp_path)])
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 2
    assert "--watch needs a terminal" in done.stderr
    both = CliRunner().invoke(app, ["jobs", "--watch", "--json", "--runs", str(tmp_path)])
    assert "a program asks again by itself" in str(both.exception)


def test_on_a_terminal_it_shows_what_changes_until_ctrl_c(monkeypatch):
    states, written = iter(["running", "stalled"]), io.StringIO()
    pauses = iter([None, KeyboardInterrupt()])

    def sleep(seconds):
        assert seconds == 7.0
        if end := next(pauses):
            raise end

    monkeypatch.setattr("time.sleep", sleep)
    console = Console(file=written, force_terminal=True, width=120, height=20)
    watch_table(lambda: ([replace(ROW, state=next(states))], ""), 7.0, console)
    text = written.getvalue()
    assert text.index("1 running") < text.index("1 stalled")
    # Another screen, which is left at the end.
    assert text.index("\x1b[?1049h") < text.index("1 running")
    assert text.index("\x1b[?1049l") > text.index("1 stalled")


def test_what_needs_a_look_comes_first_where_not_all_have_room():
    rows = [replace(ROW, run=Path(f"runs/{n}"), state=state) for n, state in enumerate(["done"] * 30 + ["stalled"])]
    text = frame(rows, "without the queue: no answer", 80, 10, 5.0).plain
    first, head, *lines = text.splitlines()
    assert "30 done, 1 stalled" in first
    assert head.split()[:3] == ["RUN", "STATE", "SEEN"]
    assert lines[0].split()[:2] == ["runs/30", "stalled"]
    assert "25 more have no room here" in lines[-1]
    assert len(text.splitlines()) <= 10
    assert max(map(len, text.splitlines())) <= 80
    assert "no runs" in frame([], "", 80, 10, 5.0).plain


def test_a_narrow_terminal_still_says_why_a_run_needs_a_look():
    rows = [replace(ROW, state="stalled", event="no sign of rank 0 on n7 for 90 s"), replace(ROW, run=Path("runs/b"))]
    narrow, wide = (frame(rows, "", width, 24, 5.0).plain.splitlines() for width in (60, 200))
    assert narrow[3] == "    no sign of rank 0 on n7 for 90 s"
    assert (len(narrow), len(wide)) == (6, 5)
    assert max(map(len, narrow)) <= 60
    # Two lines that have no room together are not parted.
    assert "2 more have no room here" in frame(rows, "", 60, 5, 5.0).plain


def test_a_narrow_terminal_keeps_the_time_to_go():
    wide, middle, narrow = (frame([ROW], "", width, 24, 5.0).plain.splitlines() for width in (120, 60, 45))
    assert wide[1].split() == ["RUN", "STATE", "SEEN", "JOB", "STEP", "IMAGES/S", "ETA", "RESTARTS", "LAST", "EVENT"]
    assert middle[1].split() == ["RUN", "STATE", "SEEN", "STEP", "IMAGES/S", "ETA", "LAST", "EVENT"]
    assert narrow[1].split() == ["RUN", "STATE", "STEP", "ETA", "LAST", "EVENT"]
    assert narrow[2].split() == ["runs/a", "running", "40/100", "30s", "saved"]


def test_slurms_records_are_asked_seldom(monkeypatch):
    asked = []

    def ask(jobs):
        asked.append(list(jobs))
        return {7: "FAILED"}

    ends, now = Ends(ask), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for _ in range(5):
        assert ends([7, 8]) == {7: "FAILED"}
    now[0] = 100.0
    ends([7, 8])
    assert asked == [[7, 8], [8]]


@pytest.fixture
def running(tmp_path):
    """A run of 16 images/s whose last metrics are of now."""
    write_status(tmp_path / "run", "running", 40)
    write_metrics(tmp_path / "run", [{"step": 1, "kind": "start", "total_steps": 100}, *steps(1, 40)])
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("changes", "seen_s", "steps_on"),
    [
        ({"waiting_s": 3.0}, 3.0, True),
        # The same process has written nothing yet: what is known of its pace is of the one before.
        ({"waiting_s": 400.0, "limit_s": 3600.0, "started_unix_s": NOW + 50}, 400.0, False),
        ({"waiting_s": 30.0, "phase": "in EvaluationHook", "limit_s": 3600.0}, 30.0, False),
    ],
)
def test_a_rate_is_of_steps_that_are_made_now(running, changes, seen_s, steps_on):
    write_beat(running, unix_time_s=NOW + 60, **changes)
    os.utime(running / "metrics.jsonl", (NOW, NOW))
    run = read_run(running, [])
    found = describe(run, NOW + 60)
    assert found.state == "running"
    assert (found.images_per_second is not None) == (found.eta_s is not None) == steps_on
    assert found.seen_s == pytest.approx(min(seen_s, 60.0) if steps_on or "phase" in changes else seen_s)


@pytest.mark.parametrize(
    ("wrote_step", "now_s", "state", "told"),
    [
        (41, 15, "running", ""),
        (40, 15, "running", "in EvaluationHook for 15s, after step 40"),
        (41, 55, "running", ""),
        (40, 75, "stalled", "no sign of rank 0 on elsewhere for 1m, after step 40"),
        (41, 85, "stalled", "no sign of rank 0 on elsewhere for 1m, after step 41"),
    ],
)
def test_a_step_that_was_written_since_counts_more_than_a_heartbeat(running, wrote_step, now_s, state, told):
    write_attempt(running, started_unix_s=NOW - 5000)
    write_metrics(running, [{"step": 1, "kind": "start", "total_steps": 100}, *steps(1, wrote_step)])
    os.utime(running / "metrics.jsonl", (NOW + 10, NOW + 10))
    write_beat(running, unix_time_s=NOW, step=40, phase="in EvaluationHook", limit_s=3600.0, host="elsewhere")
    found = describe(read_run(running, [job(running, command="x")]), NOW + now_s)
    assert (found.state, found.event) == (state, told)


@pytest.mark.parametrize(
    ("wrote_s_ago", "began_s_ago", "state", "event"),
    [
        (20, 5000, "running", ""),
        (900, 5000, "stalled", "no heartbeat, and no metrics for 15m, after step 40"),
        (900, 100, "running", "starting"),
        (9000, 5000, "stalled", "no heartbeat and no metrics since it began, 1h 23m ago"),
    ],
)
def test_a_job_without_heartbeats_is_judged_by_its_metrics(running, wrote_s_ago, began_s_ago, state, event):
    write_attempt(running, started_unix_s=NOW - began_s_ago)
    os.utime(running / "metrics.jsonl", (NOW - wrote_s_ago, NOW - wrote_s_ago))
    found = describe(read_run(running, [job(running, command="x")]), NOW)
    assert found.state == state
    assert event in found.event
    assert found.seen_s == pytest.approx(min(wrote_s_ago, began_s_ago))


def test_a_step_that_stood_still_is_no_part_of_the_time_to_go(running):
    write_attempt(running, started_unix_s=NOW - 5000)
    start = {"step": 1, "kind": "start", "total_steps": 100}
    write_metrics(running, [start, *steps(1, 38), *steps(39, 39, step_ms=80_000.0), *steps(40, 40)])
    assert row(running, [job(running, command="x")]).eta_s == pytest.approx(60 * 0.5)


def test_a_request_that_is_old_says_so(running):
    write_attempt(running, started_unix_s=NOW - 5000)
    save_request(running, Request(action="stop", unix_time_s=NOW - 600, user="ann"))
    write_beat(running, unix_time_s=NOW - 500, step=40, host="elsewhere")
    found = describe(read_run(running, [job(running, command="x")]), NOW)
    assert found.state == "stopping"
    assert found.event.startswith("stop was asked for by ann 10m ago; no sign of rank 0 on elsewhere for 8m")
    # It has stood still ever since, which a narrow terminal says below.
    narrow = frame([replace(found, run=Path("runs/a"))], "", 100, 24, 5.0).plain
    assert narrow.splitlines()[3] == f"    {found.event}"
    write_beat(running, step=40, unix_time_s=NOW, host="elsewhere")
    found = describe(read_run(running, [job(running, command="x")]), NOW)
    assert (found.state, found.stands_still) == ("stopping", False)


def test_the_last_event_is_found_however_far_it_lies_behind(running):
    write_attempt(running, started_unix_s=NOW - 5000)
    event = {"step": 1, "kind": "event", "text": "saved step_00000001"}
    write_metrics(running, [event, *steps(1, 2000)])
    assert row(running, [job(running, command="x")]).event == "saved step_00000001"


def test_what_is_wrong_comes_before_what_happened_since(running):
    write_attempt(running, started_unix_s=NOW - 5000)
    write_beat(running, step=42, host="elsewhere")
    warned = {"warnings": [{"step": 12, "text": "branch 1 learns nothing"}]}
    event = {"step": 42, "kind": "event", "text": "saved step_00000042"}
    write_metrics(running, [*steps(1, 40), steps(41, 41)[0] | warned, event])
    found = row(running, [job(running, command="x")])
    assert (found.state, found.event) == ("running", "saved step_00000042")
    assert found.news == "step 12: branch 1 learns nothing; saved step_00000042"
    narrow = frame([replace(found, run=Path("runs/a")), replace(ROW, run=Path("runs/b"))], "", 60, 24, 5.0)
    assert narrow.plain.splitlines()[3].startswith("    step 12: branch 1 learns nothing; saved")
    assert "bold yellow" in {str(span.style) for span in narrow.spans}
    # It comes first where not all have room.
    few = frame([replace(ROW, run=Path(f"runs/{n}")) for n in range(30)] + [found], "", 300, 10, 5.0).plain
    assert "learns nothing" in few
    # Of an earlier attempt nothing is known any more.
    os.utime(running / "metrics.jsonl", (NOW - 6000, NOW - 6000))
    assert row(running, [job(running, command="x")]).news == "starting, attempt 0"


def test_a_run_at_rest_tells_for_how_long(tmp_path):
    write_status(tmp_path / "run", "done", 3, seconds_ago=7200)
    assert describe(read_run(tmp_path / "run", []), NOW).seen_s == pytest.approx(7200)


@pytest.mark.parametrize(("width", "heads"), [(150, 9), (120, 9), (60, 5), (48, 5)])
def test_a_long_path_leaves_the_other_columns_their_room(width, heads):
    paths = [Path("/data/somebody/runs") / name for name in ("h6b_1024_first", "h6b", "x" * 90)]
    lines = frame([replace(ROW, run=path) for path in paths], "", width, 24, 5.0).plain.splitlines()
    assert len(lines[1].replace("LAST EVENT", "LAST").split()) == heads
    for path, line in zip(paths, lines[2:], strict=False):
        run, *cells = line.split()
        # The end tells runs apart.
        assert str(path).endswith(run.removeprefix(".."))
        assert {"running", "40/100", "30s"} <= set(cells)
    assert max(map(len, lines)) <= width
