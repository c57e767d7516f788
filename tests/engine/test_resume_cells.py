"""A run that goes on is the run without a break, in every layout: the product of all, and a few that hold each pair."""

from __future__ import annotations

import pytest
import resume_cells as cells

CHOSEN = cells.covering(cells.every_cell())


def differences(root, chosen) -> dict[cells.Cell, tuple[float, float]]:
    return {cell: cells.difference(*pair) for cell, pair in cells.run_cells(root, chosen).items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return differences(tmp_path_factory.mktemp("cells"), CHOSEN)


def test_the_few_hold_every_pair_of_the_product():
    every = cells.every_cell()
    assert set().union(*map(cells._pairs, every)) == set().union(*map(cells._pairs, CHOSEN))
    assert len(every) == 9 * 3 * 2 * 2 * 3 + 36
    assert len(CHOSEN) < 30


@pytest.mark.parametrize("cell", CHOSEN, ids=lambda cell: "-".join(str(value) for value in vars(cell).values()))
def test_going_on_is_the_run_without_a_break(found, cell):
    assert cells.is_equal(cell, found[cell]), found[cell]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_cell_of_the_product_goes_on(tmp_path):
    apart = differences(tmp_path, cells.every_cell())
    assert {cell: values for cell, values in apart.items() if not cells.is_equal(cell, values)} == {}
