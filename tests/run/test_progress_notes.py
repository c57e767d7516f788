"""A run's notes of itself are written beside its steps, and none is lost between two threads."""

import errno
import json
import os
import threading

import pytest

from piip_scale.errors import RunError
from piip_scale.run.gpu_time import GpuTimeFile
from piip_scale.run.progress_notes import ProgressNotes
from piip_scale.run.run_dir import RunDirectory


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_status("running", 0)
    return run


@pytest.fixture
def disk(monkeypatch):
    """Waits for the disk last until it is set."""
    is_free, asked, fsync = threading.Event(), threading.Event(), os.fsync

    def slow(descriptor):
        asked.set()
        assert is_free.wait(240)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    is_free.asked = asked
    return is_free


def test_a_step_does_not_wait_and_a_busy_disk_has_the_next_left_out(run, disk):
    gpu_time = GpuTimeFile(run.gpu_time, 2)
    seen_s = json.loads(run.gpu_time.read_text())["seen_unix_s"]
    notes = ProgressNotes(run, gpu_time)
    notes.note(10)
    notes.note(20)
    assert run.status().step == 0
    disk.set()
    notes.finish()
    assert run.status().step == 10
    assert json.loads(run.gpu_time.read_text())["seen_unix_s"] > seen_s
    notes.note(30)
    notes.finish()
    assert run.status().step == 30


def test_a_checkpoint_noted_meanwhile_stays_noted(run, disk):
    notes = ProgressNotes(run)
    notes.note(10)
    assert disk.asked.wait(240)
    beside = threading.Thread(target=run.note_checkpoint, args=(8,))
    beside.start()
    disk.set()
    beside.join()
    notes.finish()
    assert (run.status().step, run.status().checkpoint_step) == (10, 8)


def test_what_the_disk_refuses_ends_the_run_at_the_next_note(run, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    notes = ProgressNotes(run)
    notes.note(10)
    assert notes._is_idle.wait(240)
    with pytest.raises(RunError, match=r"status\.json: No space left.*free some space"):
        notes.note(20)
    with pytest.raises(RunError, match="No space left"):
        notes.finish()
    assert run.status().step == 0
