"""Detectors under ZeRO against torch alone; the table of all cases is in benchmarks/engine.md."""

from __future__ import annotations

import pytest
from preloaded import run_ranks
from sections.equality import FIRST_STEP_TOLERANCE, KINDS, RANKS, STAGES, WEIGHTS_TOLERANCE, alone, difference, train


@pytest.fixture(scope="module")
def references():
    return {kind: alone(kind) for kind in KINDS}


def assert_same(found, expected):
    apart = difference(found, expected)
    assert expected.moved > 0.1
    assert apart.loss < FIRST_STEP_TOLERANCE
    assert apart.norm < FIRST_STEP_TOLERANCE
    assert apart.weights < WEIGHTS_TOLERANCE


@pytest.fixture(scope="module")
def under_zero_3():
    return run_ranks(2, train, [(kind, 3) for kind in KINDS], timeout_s=500)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_of_zero_3_train_a_detector_as_torch_alone(under_zero_3, references, kind):
    assert_same(under_zero_3[kind, 3], references[kind])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_every_stage_trains_a_detector_as_torch_alone(references, num_ranks):
    cases = [(kind, stage) for kind in KINDS for stage in STAGES]
    for case, trained in run_ranks(num_ranks, train, cases, timeout_s=1500)[0].items():
        assert_same(trained, references[case[0]])
