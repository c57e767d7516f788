"""Plans against the most bytes of tensors that real steps hold at one time."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from sections.memory_plans import CLOSE, Case, measured, planned_bytes

ALONE = (
    Case("stage 3", 1, {"stage": 3}),
    Case("stage 2", 1, {"stage": 2}),
    Case("stage 3, DINO", 1, {"stage": 3}, kind="dino"),
)
OTHERS = (
    Case("stage 0", 2, {"stage": 0}, "fp32"),
    Case("stage 2", 2, {"stage": 2}),
    Case("stage 3", 2, {"stage": 3}, averaged=True, accumulation=2),
)


def assert_planned(cases, peaks):
    for case, found in zip(cases, peaks, strict=True):
        assert planned_bytes(case) == pytest.approx(found.most, rel=CLOSE), case.name


@pytest.mark.slow
@pytest.mark.parametrize("cases", [ALONE, OTHERS], ids=["one rank", "two ranks"])
def test_steps_hold_what_was_planned(cases):
    assert_planned(cases, run_ranks(cases[0].ranks, measured, cases)[0])
