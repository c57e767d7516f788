from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from histories import attempt, histories
from hypothesis import given, settings
from hypothesis import strategies as st

from piip_scale.errors import RunError
from piip_scale.launch.attempts import History, next_number, parse_attempts


# Disks of a busy machine take their time.
@settings(deadline=None)
@given(histories(), st.data())
def test_whatever_a_kill_leaves_of_the_file_is_a_history(tmp_path_factory, found, data):
    history = History(tmp_path_factory.mktemp("job") / "attempts.jsonl")
    for one in found:
        history.write(one)
    whole = history.path.read_bytes()
    assert History(history.path).read() == tuple(found)
    history.path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    left = History(history.path).read()
    assert left == tuple(found[: len(left)])
    # And it goes on after the torn line.
    new = attempt(next_number(left), "hang")
    History(history.path).write(new)
    assert History(history.path).read() == (*left, new)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_content_of_the_file_is_an_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("job") / "attempts.jsonl"
    path.write_bytes(content)
    assert History(path).read() == ()


def test_the_last_line_of_an_attempt_tells_all_and_unknown_keys_are_passed_over(tmp_path):
    history = History(tmp_path / "a" / "attempts.jsonl")
    assert history.read() == ()
    assert next_number(()) == 0
    history.write(attempt(0, None))
    assert history.read()[0].end is None
    history.write(attempt(0, "done", last=9))
    lines = history.path.read_text().splitlines()
    later = json.dumps(json.loads(lines[-1]) | {"of_a_later_version": 1})
    assert parse_attempts([*lines, later, "[]", "3", '{"attempt": "x", "nodes": []}']) == (attempt(0, "done", last=9),)


def test_a_full_disk_keeps_the_line_until_there_is_room(tmp_path, monkeypatch):
    history = History(tmp_path / "attempts.jsonl")
    history.write(attempt(0, "crashed"))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        history.write(attempt(1, "crashed"))
        assert len(history.read()) == 2
    history.write(attempt(2, "done"))
    assert [one.attempt for one in History(history.path).read()] == [0, 1, 2]


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        History(tmp_path / "file" / "attempts.jsonl").write(attempt())


def test_a_writer_that_is_killed_leaves_whole_lines_and_at_most_one_torn(tmp_path):
    path = tmp_path / "attempts.jsonl"
    code = (
        "import sys; from pathlib import Path\n"
        "from piip_scale.launch.attempts import Attempt, History\n"
        "history = History(Path(sys.argv[1]))\n"
        "for number in range(10**6):\n"
        "    history.write(Attempt(number, 1, 0, ('n1',) * 50, 0.0))\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    deadline = time.monotonic() + 240
    while not path.exists() or path.stat().st_size < 5000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    found = History(path).read()
    assert [one.attempt for one in found] == list(range(len(found)))
    assert len(found) >= len(path.read_bytes().splitlines()) - 1
