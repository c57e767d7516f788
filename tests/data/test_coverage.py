"""Exact coverage against shapely, which cuts polygons with cells one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piip_scale.data.coverage import covered_shares

shapely = pytest.importorskip("shapely", reason="needs shapely, which comes with mmdet")

SIDE = 7
STARS = st.lists(st.floats(0.2, 1.0), min_size=3, max_size=12)
PLACES = st.tuples(st.floats(-3, SIDE + 3), st.floats(-3, SIDE + 3))


def star(reaches, centre, scale, turn):
    angles = turn + np.linspace(0, 2 * np.pi, len(reaches), endpoint=False)
    return np.array(centre) + scale * np.array(reaches)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def shares_by_shapely(outline):
    polygon = shapely.Polygon(outline)
    cells = [[shapely.box(x, y, x + 1, y + 1) for x in range(SIDE)] for y in range(SIDE)]
    return np.array([[polygon.intersection(cell).area for cell in row] for row in cells])


@settings(deadline=None, max_examples=60)
@given(STARS, PLACES, st.floats(0.1, 40.0), st.floats(0, 7), st.booleans())
def test_shares_are_those_of_cells_cut_one_by_one(reaches, centre, scale, turn, backwards):
    outline = star(reaches, centre, scale, turn)
    found = covered_shares([outline[::-1] if backwards else outline], [0], 1, SIDE)
    np.testing.assert_allclose(found[0], shares_by_shapely(outline), atol=1e-5)


def test_edges_on_the_lines_of_the_grid():
    outline = np.array([[1.0, 2.0], [4.0, 2.0], [4.0, 7.0], [1.0, 7.0]])
    expected = np.zeros((SIDE, SIDE))
    expected[2:7, 1:4] = 1
    for turned in range(4):
        np.testing.assert_allclose(
            covered_shares([np.roll(outline, turned, axis=0)], [0], 1, SIDE)[0], expected, atol=1e-6
        )
    whole = np.array([[0.0, 0.0], [SIDE, 0.0], [SIDE, SIDE], [0.0, SIDE]])
    np.testing.assert_allclose(covered_shares([whole], [0], 1, SIDE)[0], 1, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(STARS, PLACES, st.floats(0.5, 9.0)), min_size=1, max_size=4))
def test_masks_do_not_see_each_other_and_overlaps_count_once(shapes):
    outlines = [star(reaches, centre, scale, 0.3) for reaches, centre, scale in shapes]
    together = covered_shares(outlines, list(range(len(outlines))), len(outlines), SIDE)
    alone = [covered_shares([outline], [0], 1, SIDE)[0] for outline in outlines]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    turned = [outline[:: (-1) ** number] for number, outline in enumerate(outlines)]
    joined = covered_shares(turned, [0] * len(outlines), 1, SIDE)[0]
    np.testing.assert_allclose(joined, np.minimum(np.sum(alone, axis=0), 1), atol=1e-5)
