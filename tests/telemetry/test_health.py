"""What is wrong with a run is said once, and only where it lasts."""

from __future__ import annotations

import io
import json

import pytest
from made_intervals import interval

from piip_scale.telemetry import StepRecord, Telemetry
from piip_scale.telemetry.health import Health
from piip_scale.telemetry.records import RankPace


def said_after(number, **changes):
    health = Health()
    return [line for _ in range(number) for line in health.lines(interval(**changes))]


def test_nothing_is_said_of_a_healthy_run():
    assert said_after(100) == []


@pytest.mark.parametrize(
    ("patience", "changes", "told"),
    [
        (3, {"data_wait_share": 0.8}, "steps wait for data 80% of their time: more data.workers"),
        (
            3,
            {"slowest": RankPace(3, "n7", 0.45, 0.4), "fastest": RankPace(0, "n1", 0.1, 0.0)},
            "rank 3 on n7 is slow, and the others wait for it: 450 ms a step of its own, 400 of them for data, "
            "where rank 0 on n1 takes 100",
        ),
        (
            20,
            {"gradient_norms": {"branch 1": 1e-9, "heads": 1.0}},
            "branch 1 learns nothing: its gradient's norm is 1.0e-09",
        ),
        (
            20,
            {"gammas": {"0": 1e-8, "1": 0.1}},
            "nothing flows into branch 0: the gammas of its interactions are 1.0e-08",
        ),
    ],
)
def test_what_lasts_is_said_once(patience, changes, told):
    assert said_after(patience - 1, **changes) == []
    (line,) = said_after(100, **changes)
    assert line.startswith(told)


def test_what_comes_and_goes_is_not_said():
    health = Health()
    assert not [line for turn in range(100) for line in health.lines(interval(data_wait_share=0.9 * (turn % 3 > 0)))]


def record(step, **changes):
    return StepRecord(
        step, {"loss": 1.0}, lr=0.1, images=4, step_seconds=0.5, data_wait_seconds=0.0, memory_bytes=1, **changes
    )


def test_a_line_of_health_is_an_event_too(tmp_path):
    told = io.StringIO()
    telemetry = Telemetry(tmp_path, total_steps=9, stream=told, show_progress=False)
    for step in range(1, 4):
        telemetry.step(record(step, interval=interval(data_wait_share=0.8)))
    telemetry.close()
    assert told.getvalue().startswith("step 3  steps wait for data 80%")
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 3, "kind": "event", "text": told.getvalue().strip().removeprefix("step 3  ")}


def test_what_was_of_use_goes_on_from_the_steps_that_stay(tmp_path):
    for first, last in ((0, 4), (2, 3)):
        telemetry = Telemetry(tmp_path, total_steps=9, first_step=first, show_progress=False)
        assert telemetry.useful_gpu_seconds() == (200.0 if first else 0.0)
        for step in range(first + 1, last + 1):
            telemetry.step(record(step, interval=interval(useful_gpu_seconds=100.0 * step)))
        telemetry.close()
