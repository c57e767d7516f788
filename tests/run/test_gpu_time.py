from __future__ import annotations

import json
import logging

import pytest

from piip_scale.run import gpu_time
from piip_scale.run.gpu_time import GpuTimeFile


class Clock:
    """Time, and when the process began, as the module asks for them."""

    def __init__(self, monkeypatch):
        self.now_s = self.began_s = 1000.0
        monkeypatch.setattr(gpu_time.time, "time", lambda: self.now_s)
        monkeypatch.setattr(gpu_time, "process_start_unix_s", lambda: self.began_s)

    def start(self, path, num_ranks, last_sign_s=0.0):
        self.began_s = self.now_s
        return GpuTimeFile(path, num_ranks, last_sign_s)

    def __call__(self, seconds):
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_all_attempts_count_with_their_ranks_and_the_time_between_them_does_not(tmp_path, clock):
    path = tmp_path / "gpu_time.json"
    first = clock.start(path, 4)
    clock(10)
    assert first.note() == 40
    clock(100)
    second = clock.start(path, 2)
    assert second.attempt == 2
    clock(5)
    assert second.note() == 50
    clock(7)
    # It lived on after its last note, as its heartbeat shows.
    third = clock.start(path, 8, last_sign_s=clock.now_s - 1)
    assert (third.attempt, third.note()) == (3, 40 + 2 * 11)


@pytest.mark.parametrize("text", ["", "[1]", '{"attempt": 3}', '{"attempt": null}', "\x00"])
def test_a_file_that_is_broken_is_said_and_counts_from_here(tmp_path, clock, caplog, monkeypatch, text):
    monkeypatch.setattr(logging.getLogger("piip_scale"), "propagate", True)
    path = tmp_path / "gpu_time.json"
    path.write_text(text)
    assert clock.start(path, 1).attempt == 1
    assert "cannot be read" in caplog.text
    assert json.loads(path.read_text())["attempt"] == 1
