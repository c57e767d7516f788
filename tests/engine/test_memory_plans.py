"""Plans against the most bytes of tensors that real steps hold at one time."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from sections.memory_plans import CLOSE, Case, measured, planned_bytes

SMALL = {"large_dim": 128, "depth": 2}
ALONE = Case("stage 3", 1, {"stage": 3}, images=4, network=SMALL)
OTHERS = (
    Case("stage 0", 2, {"stage": 0}, "fp32"),
    Case("stage 2", 2, {"stage": 2}),
    Case("stage 3", 2, {"stage": 3}, averaged=True, accumulation=2),
)


def assert_planned(cases, peaks):
    for case, found in zip(cases, peaks, strict=True):
        assert planned_bytes(case) == pytest.approx(found.most, rel=CLOSE), case.name


def test_a_step_on_one_rank_holds_what_was_planned():
    assert_planned([ALONE], run_ranks(1, measured, [ALONE])[0])


@pytest.mark.slow
def test_steps_of_two_ranks_hold_what_was_planned():
    assert_planned(OTHERS, run_ranks(2, measured, OTHERS)[0])
