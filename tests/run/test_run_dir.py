import errno
import json
import logging
import os
import socket
import time

import psutil
import pytest

from piip_scale.errors import DataError, RunError
from piip_scale.run import bad_steps, run_dir
from piip_scale.run.ending import ending_of
from piip_scale.run.run_dir import RunDirectory, write_text_atomic


def opened(path) -> RunDirectory:
    run = RunDirectory(path)
    run.open("model = 1\n", resume=False)
    run.write_status("running", 0)
    return run


def test_a_new_directory_holds_config_environment_and_status(tmp_path):
    run = opened(tmp_path / "a" / "run")
    assert run.config.read_text() == "model = 1\n"
    environment = json.loads(run.environment.read_text())
    assert environment["libraries"]["torch"]
    assert environment["command"]
    assert run.status().state == "running"


def test_a_used_directory_is_refused_with_state_and_step_and_left_alone(tmp_path):
    run = opened(tmp_path)
    run.write_status("stopped", 12)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(RunError, match=r"stopped at step 12.*--resume") as caught:
        RunDirectory(tmp_path).open("model = 2\n", resume=False)
    assert "\n" not in caught.value.line
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_resume_needs_a_run_and_keeps_its_config(tmp_path):
    with pytest.raises(RunError, match="no run to resume"):
        RunDirectory(tmp_path).open("x", resume=True)
    run = opened(tmp_path)
    RunDirectory(tmp_path).open("other\n", resume=True)
    assert run.config.read_text() == "model = 1\n"


@pytest.fixture
def later(monkeypatch):
    """Makes this process one that begins now; clocks of file systems are coarse."""

    def begin():
        time.sleep(0.05)
        now = time.time()
        monkeypatch.setattr(run_dir, "process_start_unix_s", lambda: now)
        time.sleep(0.05)

    return begin


def test_errors_of_an_earlier_launch_do_not_count_whoever_comes_first(tmp_path, later):
    run = opened(tmp_path)
    run.record_error(0, ValueError("old"))
    assert run.first_error().line == "ValueError: old"
    later()
    assert run.first_error() is None
    # A rank that fails before the main rank has opened the directory; the main rank then leaves its error alone.
    assert run.record_error(1, ValueError("new"))
    assert not run.record_error(2, ValueError("newer"))
    RunDirectory(tmp_path).open("other\n", resume=True)
    assert run.first_error().line == "ValueError: new"
    assert sorted(path.name for path in run.errors.iterdir()) == ["first.json", "rank_1.txt", "rank_2.txt"]


def test_traces_of_an_earlier_launch_are_cleared(tmp_path, later):
    run = opened(tmp_path)
    run.record_error(0, ValueError("old"))
    (run.stacks / "rank_0.txt").write_text("old")
    later()
    RunDirectory(tmp_path).open("other\n", resume=True)
    assert [*run.errors.iterdir(), *run.stacks.iterdir()] == []
    run.record_error(0, ValueError("new"))
    run.clear_traces()
    assert [*run.errors.iterdir()] == []


def test_this_process_began_before_now_and_after_its_parent():
    begun, parent = run_dir.process_start_unix_s(), psutil.Process().parent()
    # The time of boot, from which psutil counts, is in whole seconds.
    assert begun == pytest.approx(psutil.Process().create_time(), abs=1.1)
    assert parent.create_time() - 1.1 <= begun < time.time()


def test_resuming_with_another_config_is_told_and_kept(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("piip_scale"), "propagate", True)
    run = opened(tmp_path)
    RunDirectory(tmp_path).open("model = 2\n", resume=True)
    assert run.resumed_config.read_text() == "model = 2\n"
    assert "resuming with another config" in caplog.text
    caplog.clear()
    RunDirectory(tmp_path).open("model = 1\n", resume=True)
    assert not run.resumed_config.exists()
    assert not caplog.text


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="is a file"):
        RunDirectory(tmp_path / "run").open("x", resume=False)


def test_exactly_one_rank_claims_the_first_error(tmp_path):
    run = opened(tmp_path)
    assert run.record_error(3, DataError("broken", value="a.tar"))
    assert not run.record_error(0, RuntimeError("connection closed"))
    first = run.first_error()
    assert (first.rank, first.line, first.exit_code, first.reason) == (3, "broken: got 'a.tar'", 2, "bad data")
    assert (first.node, first.step) == (socket.gethostname(), 0)
    assert "DataError" in (run.errors / "rank_3.txt").read_text()
    assert "connection closed" in (run.errors / "rank_0.txt").read_text()


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_text_atomic(path, "old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"No space left.*free some space"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_the_ending_that_a_rank_left_is_the_one_in_the_status(tmp_path):
    run = opened(tmp_path)
    ending = run.record_error(3, DataError("broken", value="a.tar"), step=5, node="n3")
    run.write_failure(ending)
    assert run.first_error() == run.status().ending == ending
    # Somebody who knows more speaks for all files at once; the traceback stays.
    better = ending.failed("lost rank", "rank 1 was killed", rank=1)
    run.replace_ending(better)
    assert run.first_error() == run.status().ending == better
    assert "DataError" in (run.errors / "rank_3.txt").read_text()
    # Another rank, woken to leave its stack, goes on for some moments.
    run.write_status("running", 7)
    assert run.status().ending == better


def test_a_rank_that_fails_while_another_notes_its_step_has_the_last_word(tmp_path, monkeypatch):
    run, write, endings = opened(tmp_path), RunDirectory._write_status, []

    def written_late(self, status):
        if not endings:
            endings.append(run.record_error(1, DataError("broken", value="a.tar"), step=7))
            run.write_failure(endings[0])
        write(self, status)

    monkeypatch.setattr(RunDirectory, "_write_status", written_late)
    run.write_status("running", 7)
    assert (run.status().state, run.status().ending) == ("failed", endings[0])


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"state": "running"}', '{"state": "odd", "step": 1}', '{"state": "done", "step": "x"}'],
)
def test_a_status_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(RunError, match="cannot be read") as caught:
        RunDirectory(tmp_path).status()
    assert "\n" not in caught.value.line


def test_a_status_of_other_versions_still_tells_state_and_step(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "stopped", "step": 7, "note": "x", "reason": ""}')
    status = RunDirectory(tmp_path).status()
    assert (status.state, status.step, status.line) == ("stopped", 7, "")
    (tmp_path / "status.json").write_text('{"state": "failed", "step": 7, "ending": {"line": "so", "of_later": 1}}')
    assert RunDirectory(tmp_path).status().line == "so"


def test_bad_steps_are_read_as_written_and_only_the_newest_stay(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    monkeypatch.setattr(bad_steps, "MOST_FILES", 2)
    rank = bad_steps.RankOfBadStep({"loss": float("-inf")}, 3.0, [["a", "b"]])
    written = [bad_steps.BadStep(step, "why", float("inf"), [rank], None, "ab") for step in (9, 10, 100_000_000)]
    paths = [bad_steps.write_bad_step(run, bad) for bad in written]
    assert "Infinity" not in paths[-1].read_text()
    assert bad_steps.bad_steps(run) == [10, 100_000_000]
    assert [bad_steps.read_bad_step(run, step) for step in (9, 10, 100_000_000)] == [None, *written[1:]]
    run.bad_steps.joinpath("step_00000010.json").write_text('{"ranks": 3}')
    with pytest.raises(RunError, match="move it away"):
        bad_steps.read_bad_step(run, 10)


@pytest.mark.parametrize(("noted", "behind", "told"), [(1, 2, 2), (10, 0, 10)])
def test_a_failure_is_at_the_rank_s_step_where_the_last_note_is_behind_it(tmp_path, noted, behind, told):
    run = RunDirectory(tmp_path / "run")
    run.open("config = 1\n", resume=False)
    run.write_status("running", noted)
    run.write_failure(ending_of(RunError("bad"), rank=1, step=behind))
    assert (run.status().state, run.status().step) == ("failed", told)
