"""A run that goes on is the run without a break, in every layout: the product of all, and a few that hold each pair."""

from __future__ import annotations

import pytest
import resume_cells as cells

CHOSEN = cells.covering(cells.every_cell())


@pytest.fixture(scope="module")
def found():
    return cells.differences(CHOSEN)


def test_the_few_hold_every_pair_of_the_product():
    every = cells.every_cell()
    assert set().union(*map(cells._pairs, every)) == set().union(*map(cells._pairs, CHOSEN))
    assert len(every) == 11 * 36 + 3 * 18
    assert len(CHOSEN) < 30


@pytest.mark.parametrize("cell", CHOSEN, ids=lambda cell: "-".join(str(value) for value in vars(cell).values()))
def test_going_on_is_the_run_without_a_break(found, cell):
    assert cells.is_equal(cell, found[cell]), found[cell]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("row", cells.rows_of(cells.every_cell()), ids=str)
def test_every_cell_of_the_product_goes_on(row):
    apart = cells.differences(cells.rows_of(cells.every_cell())[row])
    assert {cell: values for cell, values in apart.items() if not cells.is_equal(cell, values)} == {}
