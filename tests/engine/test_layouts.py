"""Layouts of sharding on four ranks, on nodes of two and of one: the same numbers, and the bytes that were planned."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from layout_cells import (
    IMAGES,
    LAYOUTS,
    RANKS,
    SAVED_AT,
    Cell,
    assert_replicas_are_equal,
    assert_sent_as_by_the_formula,
    train,
)
from preloaded import run_ranks
from test_equality import STEPS, assert_same, plain

from piip_scale.checkpoint.zero_reader import ZeroCheckpoint

NODE = Cell("node, 2 x 2")
IN_BF16 = Cell("node, 2 x 2", precision="bf16", reduce_dtype="bf16")
QUICK = (NODE, IN_BF16, Cell("2 ranks, 4 x 1", accumulation=1), Cell("node, 4 x 1", accumulation=1))
EVERY = tuple(
    Cell(layout, precision, reduced, accumulation)
    for layout in LAYOUTS
    for precision, reduced in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))
    for accumulation in (1, 2)
)


def trained(world, _device, cells, folder):
    """Every cell with a step that is skipped; and those that go on where the first was saved."""
    # DeepSpeed collects garbage 20 times an engine, before reports of memory.
    with mock.patch("gc.collect"):
        found = {cell: train(world, cell, nan_at=2, save=folder / str(i)) for i, cell in enumerate(cells)}
        onward = {cell: train(world, cell, go_on=folder / "0") for cell in cells if cell.precision == "fp32"}
    return found, onward


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return run_ranks(RANKS, trained, QUICK, folder), folder


def of_cell(ranks, cell, index=0):
    return [rank[index][cell] for rank in ranks]


@pytest.mark.parametrize("cell", QUICK, ids=str)
def test_a_layout_trains_as_torch_alone_and_its_replicas_are_equal(runs, cell):
    found = of_cell(runs[0], cell)
    assert_replicas_are_equal(found, cell)
    assert [applied for *_, applied in found[0].trace] == [True, True, False, True, True, True]
    expected, trace = plain(2, images=IMAGES), [call for call in found[0].trace if call[2]]
    if cell.precision == "fp32":
        assert_same({"trace": trace, "weights": found[0].weights}, expected)
    else:
        np.testing.assert_allclose(trace, expected["trace"], rtol=0.05)


@pytest.mark.parametrize("cell", QUICK, ids=str)
def test_a_step_sends_the_bytes_of_the_formula(runs, cell):
    assert_sent_as_by_the_formula(of_cell(runs[0], cell))


def test_between_nodes_nothing_travels_but_sums_of_gradients_once_a_step(runs):
    found = of_cell(runs[0], NODE)
    assert set(found[0].calls) == {"all-reduce"}
    trained = sum(weight.size for weight in found[0].weights.values())
    assert sum(run.bytes_sent[1] for run in found) == 2 * 4 * trained
    assert sum(run.bytes_sent[1] for run in of_cell(runs[0], IN_BF16)) == 2 * 2 * trained


@pytest.mark.parametrize("cell", [cell for cell in QUICK if cell.precision == "fp32"], ids=str)
def test_a_run_goes_on_in_any_layout(runs, cell):
    whole, onward = of_cell(runs[0], NODE), of_cell(runs[0], cell, 1)
    assert_replicas_are_equal(onward, cell)
    if cell == NODE:
        assert [run.slices for run in onward] == [run.slices for run in whole]
    np.testing.assert_allclose(onward[0].trace, whole[0].trace[-len(onward[0].trace) :], rtol=1e-5)
    assert onward[0].averaged == pytest.approx(whole[0].averaged, rel=1e-6)
    assert len(onward[0].trace) == STEPS - SAVED_AT


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
def test_every_layout_in_every_precision_trains_alike_and_sends_as_by_the_formula(tmp_path):
    found = [rank[0] for rank in run_ranks(RANKS, trained, EVERY, tmp_path, timeout_s=1500)]
    for cell in EVERY:
        assert_replicas_are_equal([rank[cell] for rank in found], cell)
        assert_sent_as_by_the_formula([rank[cell] for rank in found])
