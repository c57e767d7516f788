"""Coverage against shapely, which cuts polygons with cells one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piip_scale.data.augment.coverage import draw_covered
from piip_scale.errors import DataError

shapely = pytest.importorskip("shapely", reason="needs shapely, which comes with mmdet")

SIDE = 7
STARS = st.lists(st.floats(0.2, 1.0), min_size=3, max_size=12)
PLACES = st.tuples(st.floats(-3, SIDE + 3), st.floats(-3, SIDE + 3))
# Corners move by up to 1/128 of a cell, and an edge through a cell is at most 1.5 long; shares are rounded to 1/255.
TOLERANCE = 1.5 / 128 * 2 + 1 / 255


def star(reaches, centre, scale, turn):
    angles = turn + np.linspace(0, 2 * np.pi, len(reaches), endpoint=False)
    return np.array(centre) + scale * np.array(reaches)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def shares_by_shapely(outline):
    polygon = shapely.Polygon(outline)
    cells = [[shapely.box(x, y, x + 1, y + 1) for x in range(SIDE)] for y in range(SIDE)]
    return np.array([[polygon.intersection(cell).area for cell in row] for row in cells])


def shares(outlines, owners, num_masks, side=SIDE):
    masks = np.zeros((num_masks, side, side), np.uint8)
    draw_covered(np.concatenate(outlines), np.array([len(one) for one in outlines]), np.array(owners), masks)
    return masks / 255


@settings(deadline=None, max_examples=60)
@given(STARS, PLACES, st.floats(0.1, 40.0), st.floats(0, 7), st.booleans())
def test_shares_are_those_of_cells_cut_one_by_one(reaches, centre, scale, turn, backwards):
    outline = star(reaches, centre, scale, turn)
    found = shares([outline[::-1] if backwards else outline], [0], 1)
    np.testing.assert_allclose(found[0], shares_by_shapely(outline), atol=TOLERANCE)


def test_edges_on_the_lines_of_the_grid():
    outline = np.array([[1.0, 2.0], [4.0, 2.0], [4.0, 7.0], [1.0, 7.0]])
    expected = np.zeros((SIDE, SIDE))
    expected[2:7, 1:4] = 1
    for turned in range(4):
        np.testing.assert_array_equal(shares([np.roll(outline, turned, axis=0)], [0], 1)[0], expected)
    whole = np.array([[0.0, 0.0], [SIDE, 0.0], [SIDE, SIDE], [0.0, SIDE]])
    np.testing.assert_array_equal(shares([whole], [0], 1)[0], 1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(STARS, PLACES, st.floats(0.5, 9.0)), min_size=1, max_size=4))
def test_masks_do_not_see_each_other_and_overlaps_count_once(shapes):
    outlines = [star(reaches, centre, scale, 0.3) for reaches, centre, scale in shapes]
    together = shares(outlines, list(range(len(outlines))), len(outlines))
    alone = [shares([outline], [0], 1)[0] for outline in outlines]
    np.testing.assert_array_equal(together, alone)
    turned = [outline[:: (-1) ** number] for number, outline in enumerate(outlines)]
    joined = shares(turned, [0] * len(outlines), 1)[0]
    np.testing.assert_allclose(joined, np.minimum(np.sum(alone, axis=0), 1), atol=len(outlines) / 255)


def test_masks_without_polygons_and_polygons_without_corners_stay_empty():
    square = np.array([[1.0, 1.0], [3.0, 1.0], [3.0, 3.0], [1.0, 3.0]])
    found = shares([np.empty((0, 2)), square, np.empty((0, 2))], [1, 2, 2], 4)
    assert found.sum(axis=(1, 2)).tolist() == [0, 0, 4, 0]
    draw_covered(np.empty((0, 2)), np.empty(0, np.int64), np.empty(0, np.int64), np.zeros((1, SIDE, SIDE), np.uint8))


def test_a_polygon_far_larger_than_the_grid():
    far = np.array([[-1e9, -1e9], [1e9, -1e9], [1e9, 3.5], [-1e9, 3.5]])
    np.testing.assert_allclose(
        shares([far], [0], 1)[0], np.tile([[1], [1], [1], [0.5], [0], [0], [0]], SIDE), atol=0.01
    )


def test_more_corners_than_the_rasteriser_takes():
    circle = star([1.0] * 200_000, (50, 50), 40, 0)
    few = star([1.0] * 2_000, (50, 50), 40, 0)
    found = shares([circle, few[:3], circle - 5], [0, 1, 2], 3, 100)
    np.testing.assert_allclose(found[[0, 2]], shares([few, few - 5], [0, 1], 2, 100), atol=0.02)


def test_corners_that_are_no_numbers():
    with pytest.raises(DataError, match="corner that is no finite number"):
        shares([np.array([[0, 0], [np.nan, 1], [1, 1]])], [0], 1)


def test_more_polygons_than_the_rasteriser_takes():
    triangle = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    with pytest.raises(DataError, match="40000 polygons"):
        shares([triangle] * 40_000, [0] * 40_000, 1)
