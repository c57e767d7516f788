from __future__ import annotations

import pytest

from piip_scale.errors import ConfigError
from piip_scale.run.profiled_steps import ProfiledSteps, parse_profiled_steps


@pytest.mark.parametrize(("text", "steps"), [("10", ProfiledSteps(10, 10)), ("3-7", ProfiledSteps(3, 7))])
def test_steps_are_read_and_written_alike(text, steps):
    assert parse_profiled_steps(text) == steps
    assert str(steps) == text


def test_none_are_asked_for_by_nothing():
    assert parse_profiled_steps("") is None


@pytest.mark.parametrize("text", ["2", "0", "x", "10-", "12-10", "10-15", "-3", "10,12", "1e3", " 10"])
def test_what_cannot_be_meant_is_one_line(text):
    with pytest.raises(ConfigError, match=r"--profile: got .*write 10 or 10-12") as caught:
        parse_profiled_steps(text)
    assert "\n" not in caught.value.line


def test_a_profile_ends_before_what_is_no_step():
    steps = ProfiledSteps(10, 12)
    assert steps.until(0, 100, 0) == 12
    assert steps.until(0, 11, 100) == 11
    # Of the run, not of the attempt.
    assert steps.until(90, 100, 0) == 10
    assert steps.until(0, 12, 9) == 12
