"""The script that measures one GPU, at toy sizes on a CPU: every section runs, and nothing measured is lost."""

import json
import os
import sys
from types import SimpleNamespace

import gpu
import preloaded
import pytest
import torch
from sections.gpu import SECTIONS, step, training
from sections.gpu.jobs import Job, is_device_broken, run_jobs
from sections.gpu.running import Record, run_sections


def failures(rows):
    return {name: values for name, values in rows if "error" in values or values.get("right") is False}


def forked(command, *, cwd, env, stdout, stderr, start_new_session, text):
    """``subprocess.Popen`` of a Python in a session of its own, whose output nobody reads."""
    return preloaded.Python(command[1:], cwd=cwd, env=env, preexec_fn=os.setsid)


def run_forked(command, *, capture_output, text, **settings):
    """``subprocess.run`` of a Python."""
    return preloaded.run(command[1:], **settings)


@pytest.fixture
def _processes_are_forked(monkeypatch):
    """Trainings and ranks that a section starts; the section of the machine is started as any is."""
    monkeypatch.setattr(step, "run_ranks", preloaded.run_ranks)
    monkeypatch.setattr(training, "subprocess", SimpleNamespace(Popen=forked, run=run_forked))


@pytest.mark.usefixtures("_processes_are_forked")
@pytest.mark.parametrize("section", [name for name in SECTIONS if name != "machine"])
def test_every_job_of_a_section_gives_figures(section):
    threads = torch.get_num_threads()
    try:
        rows = list(run_jobs(gpu.section_jobs(section, rehearse=True), (), 600))
    finally:
        torch.set_num_threads(threads)
    assert rows
    assert failures(rows) == {}
    assert all(len(values) > 1 for _, values in rows)


def test_sections_run_in_processes_of_their_own_and_go_on_where_they_were(tmp_path):
    shown = []
    record = Record(tmp_path, rehearse=True)
    record.add("machine", "what it is", {"device": "known already"})
    run_sections(record, ["machine"], 120, shown.append)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [job.name for job in gpu.section_jobs("machine", rehearse=True)]
    assert lines[0]["device"] == "known already"
    assert failures((line["name"], line) for line in lines) == {}
    page = (tmp_path / "gpu.md").read_text()
    assert "rehearsed: no figure means anything" in page
    assert "| copy of 1 GiB |" in page
    assert Record(tmp_path, rehearse=True).rows == lines
    assert any(line.startswith("machine: a launch: ") for line in shown)


def test_a_job_that_fails_is_a_row_and_the_others_go_on():
    def fail():
        raise ValueError("two\nlines")

    jobs = [Job("bad", fail), Job("known", fail), Job("good", lambda: {"ms": 1.0})]
    rows = dict(run_jobs(jobs, {"known"}, 60))
    assert rows["bad"]["error"] == "ValueError: two lines"
    assert rows["good"]["ms"] == 1.0
    assert list(rows) == ["bad", "good"]


def test_no_job_begins_after_the_time_is_out():
    assert list(run_jobs([Job("late", dict)], (), -1)) == []


class Clock:
    """In place of the clock and the timer of whoever runs sections: time is out when a test says so."""

    def __init__(self) -> None:
        self.now_s, self._timers = 0.0, []

    def monotonic(self):
        return self.now_s

    def Timer(self, seconds, function):  # noqa: N802 - threading's name
        self._timers.append((self.now_s + seconds, function))
        return SimpleNamespace(start=lambda: None, cancel=lambda: None)

    def out(self):
        self.now_s += 1000.0
        for until_s, function in self._timers:
            assert until_s < self.now_s
            function()


def test_a_section_that_hangs_is_ended_and_keeps_its_rows(tmp_path, monkeypatch):
    hanging = (
        'import sys, time; print(\'ROW {"name": "first", "ms": 2}\', flush=True); print(\'a log line\', flush=True);'
        "time.sleep(600)"
    )
    clock = Clock()
    monkeypatch.setattr("sections.gpu.running.time", clock)
    monkeypatch.setattr("sections.gpu.running.threading", clock)
    monkeypatch.setattr("sections.gpu.running._command", lambda *_: [sys.executable, "-c", hanging])
    shown = []

    def show(line):
        shown.append(line)
        if line == "    a log line":
            clock.out()

    record = Record(tmp_path, rehearse=False)
    run_sections(record, ["machine", "kernels"], 60, show)
    assert record.rows == [{"section": "machine", "name": "first", "ms": 2}]
    assert "machine: its process ended with -9 (out of time)" in shown
    assert "kernels: no time is left" in shown


@pytest.mark.parametrize(
    "error", ["CUDA error: an illegal memory access was encountered", "device-side assert triggered"]
)
def test_a_broken_device_is_known_by_its_error(error):
    assert is_device_broken({"error": f"RuntimeError: {error}"})
    assert not is_device_broken({"error": "OutOfMemoryError: CUDA out of memory"})


def test_a_machine_without_a_gpu_is_one_line(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(gpu.typer.BadParameter, match="--rehearse runs everything"):
        gpu.main(out=None, minutes=1)
