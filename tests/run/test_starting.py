"""The time to the first step, by phase."""

import json
import subprocess
import sys
import time

import pytest

from piip_scale.engine.first_save import FirstSave
from piip_scale.engine.hooks import LogStart, Silence
from piip_scale.engine.step import StepResult
from piip_scale.engine.trainer import StepReport
from piip_scale.run.starting import StartClock
from piip_scale.telemetry import Telemetry
from piip_scale.telemetry.records import StartRecord

SLEPT_SECONDS = 0.3
SCRIPT = f"""
import time
time.sleep({SLEPT_SECONDS})
from piip_scale.run.starting import StartClock
clock = StartClock()
clock.end_phase("imports")
clock.end_phase("nothing")
print(clock.seconds["imports"], clock.seconds["nothing"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells when a process began")
def test_the_first_phase_begins_with_the_process():
    began = time.monotonic()
    output = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout
    whole = time.monotonic() - began
    imports, nothing = map(float, output.split())
    assert imports >= SLEPT_SECONDS
    assert nothing >= 0
    # The system counts in hundredths of a second. A second phase that began with the process would count all twice.
    assert imports + nothing <= whole + 0.02


class Heard(Silence):
    def __init__(self) -> None:
        self.records: list[StartRecord] = []
        self.events: list[str] = []

    def event(self, step: int, text: str) -> None:
        self.events.append(text)

    def start(self, record: StartRecord) -> None:
        self.records.append(record)


def test_a_start_is_told_once_and_its_phases_add_up():
    heard, clock = Heard(), StartClock()
    clock.end_phase("imports")
    clock.end_phase("build")
    hook = LogStart(heard, clock, FirstSave(num_bytes=3 << 29, seconds=40.0))
    for step in (5, 6):
        result = StepResult({}, {}, grad_norm=0.0, applied=True, sizes_px=((32, 32),))
        hook.after_step(StepReport(step, result, lr=0.1, seconds=3.0, wait_seconds=1.0))
    (record,) = heard.records
    assert (record.step, record.save_seconds) == (5, 40.0)
    assert heard.events == ["a first save of 1.50 GiB is expected to take 40.0 s"]
    assert list(record.seconds) == ["imports", "build", "first_batch", "first_step"]
    assert (record.seconds["first_batch"], record.seconds["first_step"]) == (1.0, 2.0)
    assert clock.seconds == {name: record.seconds[name] for name in ("imports", "build")}


def test_a_start_is_written_as_numbers_and_as_a_sentence(tmp_path):
    telemetry = Telemetry(tmp_path, total_steps=9, show_progress=False)
    telemetry.start(StartRecord(1, {"imports": 2.0, "first_batch": 0.5}))
    telemetry.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "kind": "start", "start/imports_seconds": 2.0, "start/first_batch_seconds": 0.5, "total_steps": 9},
        {"step": 1, "kind": "event", "text": "2.5 s from process to first step: imports 2.0, first batch 0.5"},
    ]
