"""Layouts of sharding on four ranks, on nodes of two and of one: the same numbers, and the bytes that were planned."""

from __future__ import annotations

import numpy as np
import pytest
from layout_cells import (
    EVERY,
    IMAGES,
    RANKS,
    SAVED_AT,
    Cell,
    assert_replicas_are_equal,
    assert_sent_as_by_the_formula,
    trained,
)
from preloaded import run_ranks
from test_equality import STEPS, assert_same, plain

from piip_scale.checkpoint.zero_reader import ZeroCheckpoint

NODE = Cell("node, 2 x 2")
IN_BF16 = Cell("node, 2 x 2", precision="bf16", reduce_dtype="bf16")
BEGUN = (NODE, IN_BF16)
ONWARD = (Cell("all, 2 x 2"), Cell("1 rank, 2 x 2"), Cell("2 ranks, 4 x 1", accumulation=1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return run_ranks(RANKS, trained, BEGUN, ONWARD, folder), folder


def of_cell(ranks, cell, index=0):
    return [rank[index][cell] for rank in ranks]


def assert_trained_as_alone(found, cell):
    expected, trace = plain(2, images=IMAGES), [call for call in found.trace if call[2]]
    if cell.precision == "fp32":
        assert_same({"trace": trace, "weights": found.weights}, expected)
    else:
        np.testing.assert_allclose(trace, expected["trace"], rtol=0.05)


def assert_skipped(found):
    assert [applied for *_, applied in found.trace] == [True, True, True, False, True, True]


def assert_saved_once(folder, cell):
    """Each slice by one of its replicas."""
    checkpoint = next(folder.glob("step_*"))
    assert len(list(checkpoint.rglob("*optim_states*.pt"))) == cell.ranks_of_a_copy
    assert len(list((checkpoint / "average").iterdir())) == cell.ranks_of_a_copy


def assert_gone_on(onward, whole):
    assert len(onward.trace) == STEPS - SAVED_AT
    applied = [call for call in whole.trace if call[2]]
    np.testing.assert_allclose(onward.trace, applied[SAVED_AT:], rtol=1e-5)
    assert onward.averaged == pytest.approx(whole.averaged, rel=1e-6)
    assert onward.evaluated == pytest.approx(whole.evaluated, rel=1e-5)


@pytest.mark.parametrize("cell", BEGUN, ids=str)
def test_a_layout_trains_as_torch_alone_and_its_replicas_are_equal(runs, cell):
    found = of_cell(runs[0], cell)
    assert_replicas_are_equal(found, cell)
    assert_skipped(found[0])
    assert_trained_as_alone(found[0], cell)


@pytest.mark.parametrize(("cells", "index"), [(BEGUN, 0), (ONWARD, 1)])
def test_a_step_sends_the_bytes_of_the_formula(runs, cells, index):
    for cell in cells:
        assert_sent_as_by_the_formula(of_cell(runs[0], cell, index), cell)


def test_between_nodes_nothing_travels_but_sums_of_gradients_once_a_step(runs):
    found = of_cell(runs[0], NODE)
    assert set(found[0].calls) == {"all-reduce"}
    # A bucket's as soon as the last micro-batch has made it, not all at the end.
    last = max(i for i, kind in enumerate(found[0].order) if kind == "reduce-scatter")
    assert found[0].order.index("all-reduce") < last
    num_trained = sum(weight.size for weight in found[0].weights.values())
    assert sum(run.bytes_sent[1] for run in found) == 2 * 4 * num_trained
    assert sum(run.bytes_sent[1] for run in of_cell(runs[0], IN_BF16)) == 2 * 2 * num_trained


@pytest.mark.parametrize("cell", ONWARD, ids=str)
def test_a_run_goes_on_in_any_layout(runs, cell):
    whole, onward = of_cell(runs[0], NODE), of_cell(runs[0], cell, 1)
    assert_replicas_are_equal(onward, cell)
    assert_gone_on(onward[0], whole[0])


def test_replicas_that_begin_with_other_weights_are_told(runs):
    assert [run.notices for run in of_cell(runs[0], NODE)] == [False, True, False, True]
    assert not any(run.notices for run in of_cell(runs[0], Cell("all, 2 x 2"), 1))


def test_a_checkpoint_holds_each_slice_once_written_in_turns_by_the_replicas(runs):
    checkpoint = next((runs[1] / "0").glob("step_*"))
    names = sorted(path.name for path in checkpoint.rglob("*.pt"))
    assert len([name for name in names if "optim_states" in name]) == 2
    assert len([name for name in names if "model_states" in name]) == 2
    assert sorted(path.name for path in (checkpoint / "average").iterdir()) == ["rank_00000.pt", "rank_00001.pt"]
    weights = ZeroCheckpoint(checkpoint)
    assert weights.num_ranks == 2
    assert weights.keys() == of_cell(runs[0], NODE)[0].weights.keys()


@pytest.mark.slow
def test_every_layout_in_every_precision_trains_alike_sends_as_by_the_formula_and_goes_on(tmp_path):
    exact = [cell for cell in EVERY if cell.precision == "fp32"]
    begun = [NODE, *(cell for cell in EVERY if cell != NODE)]
    ranks = run_ranks(RANKS, trained, begun, exact, tmp_path, exact, timeout_s=1500)
    whole = of_cell(ranks, NODE)[0]
    for index, cell in enumerate(begun):
        found = of_cell(ranks, cell)
        assert_skipped(found[0])
        assert_saved_once(tmp_path / str(index), cell)
        assert_replicas_are_equal(found, cell)
        assert_sent_as_by_the_formula(found, cell)
        assert_trained_as_alone(found[0], cell)
        if cell in exact:
            assert found[0].averaged == pytest.approx(whole.averaged, rel=1e-5)
            assert found[0].evaluated == pytest.approx(whole.evaluated, rel=1e-5)
            assert_gone_on(of_cell(ranks, cell, 1)[0], whole)
            assert_gone_on(of_cell(ranks, cell, 2)[0], found[0])
    assert [run.slices for run in of_cell(ranks, NODE, 1)] == [run.slices for run in of_cell(ranks, NODE)]
