"""Detectors under ZeRO against torch alone; the table of all cases is in benchmarks/engine.md."""

from __future__ import annotations

import pytest
from preloaded import run_ranks
from sections.equality import FIRST_STEP_TOLERANCE, KINDS, RANKS, STAGES, WEIGHTS_TOLERANCE, alone, difference, train


def assert_same(found, expected):
    apart = difference(found, expected)
    assert expected.moved > 0.1
    assert apart.loss < FIRST_STEP_TOLERANCE
    assert apart.norm < FIRST_STEP_TOLERANCE
    assert apart.weights < WEIGHTS_TOLERANCE


def test_two_ranks_of_zero_3_train_a_detector_as_torch_alone():
    """One of them; test_detectors_zero holds each kind against plain gradients."""
    kind = KINDS[0]
    found = run_ranks(2, train, [(kind, 3)], timeout_s=500)[0]
    assert_same(found[kind, 3], alone(kind))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_every_stage_trains_a_detector_as_torch_alone(num_ranks):
    cases, references = [(kind, stage) for kind in KINDS for stage in STAGES], {kind: alone(kind) for kind in KINDS}
    for case, trained in run_ranks(num_ranks, train, cases, timeout_s=1500)[0].items():
        assert_same(trained, references[case[0]])
