"""What is wrong with a run is said once, and only where it lasts."""

from __future__ import annotations

import io
import json

import pytest
from made_intervals import interval

from piip_scale.run.warned import Warned, warnings_of
from piip_scale.telemetry import StepRecord, Telemetry
from piip_scale.telemetry.health import Health, Incident
from piip_scale.telemetry.records import RankPace


def said_after(number, **changes):
    health = Health()
    return [line for step in range(number) for line in health.lines(step, interval(**changes))]


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
    shares = [0.9 * (turn % 3 > 0) for turn in range(100)]
    assert not [
        line for step, share in enumerate(shares) for line in health.lines(step, interval(data_wait_share=share))
    ]
    assert health.warnings(0.0) == []


def test_a_warning_stays_with_newer_figures_until_its_cause_is_long_gone():
    health, said, known = Health(), {}, {}
    shares = {step: 0.8 if step < 10 or step == 25 or step > 60 else 0.0 for step in range(1, 70)}
    for step, share in shares.items():
        said[step] = health.lines(step, interval(data_wait_share=share * (1 - step / 1000)))
        known[step] = [(warned.step, warned.text[:24]) for warned in health.warnings(0.0)]
    assert [step for step, lines in said.items() if lines] == [3, 63]
    # Twenty healthy intervals in a row: one bad one among them begins the count anew.
    assert [step for step in shares if known[step]] == [*range(3, 45), *range(63, 70)]
    assert {since for step in range(3, 45) for since, _ in known[step]} == {3}
    assert known[9] == [(3, "steps wait for data 79% ")]
    assert known[30] == [(3, "steps wait for data 78% ")]


def test_what_went_wrong_once_is_known_for_a_day():
    health = Health([Incident(5, "an old one", 1e5)])
    assert [warned.line for warned in health.warnings(1e5 + 86000)] == ["step 5: an old one"]
    health.add(Incident(7, "step not applied", 1e5 + 80000))
    told = [warned.line for warned in health.warnings(1e5 + 86000)]
    assert told == ["step 7: step not applied (the last of 2 within a day)"]
    assert [warned.line for warned in health.warnings(1e5 + 87000)] == ["step 7: step not applied"]
    assert health.warnings(1e5 + 80000 + 86401) == []


def record(step, **changes):
    return StepRecord(
        step, {"loss": 1.0}, lr=0.1, images=4, step_seconds=0.5, data_wait_seconds=0.0, memory_bytes=1, **changes
    )


def test_a_line_of_health_is_an_event_and_stays_with_the_steps(tmp_path):
    told = io.StringIO()
    telemetry = Telemetry(tmp_path, total_steps=9, stream=told, show_progress=False)
    for step in range(1, 5):
        telemetry.step(record(step, interval=interval(data_wait_share=0.8)))
    telemetry.close()
    assert told.getvalue().startswith("step 3  steps wait for data 80%")
    *_, event, last = lines_of(tmp_path)
    text = told.getvalue().strip().removeprefix("step 3  ")
    assert event == {"step": 3, "kind": "event", "text": text}
    assert [line.get("warnings") for line in lines_of(tmp_path) if line["kind"] == "step"] == [
        *(None, None),
        *[[{"step": 3, "text": text}]] * 2,
    ]
    assert warnings_of(last) == (Warned(3, text),)


def test_what_went_wrong_once_outlives_its_process_unless_the_step_is_done_again(tmp_path):
    known = []
    # The second goes on behind the first's step of it, the third before it.
    for first in (0, 2, 1):
        telemetry = Telemetry(tmp_path, total_steps=9, first_step=first, show_progress=False)
        if not first:
            telemetry.warning(2, "step not applied: so it was")
        telemetry.step(record(first + 1, interval=interval()))
        telemetry.close()
        known.append([warned.line for warned in warnings_of(lines_of(tmp_path)[-1])])
    assert known == [["step 2: step not applied: so it was"]] * 2 + [[]]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_was_of_use_goes_on_from_the_steps_that_stay(tmp_path):
    for first, last in ((0, 4), (2, 3)):
        telemetry = Telemetry(tmp_path, total_steps=9, first_step=first, show_progress=False)
        assert telemetry.useful_gpu_seconds() == (200.0 if first else 0.0)
        for step in range(first + 1, last + 1):
            telemetry.step(record(step, interval=interval(useful_gpu_seconds=100.0 * step)))
        telemetry.close()
