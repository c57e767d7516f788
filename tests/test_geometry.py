from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piip_scale import geometry
from piip_scale.geometry import NetworkGeometry, Section

CONVNEXT = geometry.convnext_sections((2, 1, 3), (16, 24, 32))
VIT = (Section(6, 64, 16),)


def test_each_later_section_of_a_convnext_opens_with_a_downsampling():
    assert (Section(2, 16, 4), Section(2, 24, 8), Section(4, 32, 16)) == CONVNEXT
    found = [geometry.locate(CONVNEXT, block) for block in range(8)]
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert [block for block in range(8) if geometry.is_downsampling(CONVNEXT, block)] == [2, 4]
    assert not any(geometry.is_downsampling(VIT, block) for block in range(6))


@given(depths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_every_block_has_one_section_and_one_index_there(depths):
    sections = geometry.convnext_sections(depths, [8] * len(depths))
    depth = geometry.depth_of(sections)
    assert depth == sum(depths) + len(depths) - 1
    found = [geometry.locate(sections, block) for block in range(depth)]
    assert found == [(index, i) for index, section in enumerate(sections) for i in range(section.num_blocks)]


def test_rates_rise_over_the_blocks_proper():
    rates = [geometry.drop_path_rate(CONVNEXT, block, 0.5, "linear") for block in range(8)]
    assert rates == pytest.approx([0.0, 0.1, 0.0, 0.2, 0.0, 0.3, 0.4, 0.5])
    assert [geometry.drop_path_rate(VIT, block, 0.5, "constant") for block in range(6)] == [0.5] * 6
    # A single block is the first and the last.
    assert geometry.drop_path_rate((Section(1, 64, 16),), 0, 0.5, "linear") == 0.5


def network(**numbers):
    whole = {
        "resolutions_px": (56, 112),
        "sections": (VIT, CONVNEXT),
        "blocks_per_stage": ((3, 3), (4, 4)),
        "level_stages": (0, 1),
        "level_scales": (2.0, 0.5),
    }
    return NetworkGeometry(**whole | numbers)


def test_stages_and_levels():
    ours = network()
    assert [ours.last_block(branch, stage) for branch in (0, 1) for stage in (0, 1)] == [2, 5, 3, 7]
    assert [ours.section_after(1, stage).stride_px for stage in (0, 1)] == [8, 16]
    assert ours.coarsest_stride_px() == 32
    assert ours.level_grids(112, 120) == ((28, 30), (3, 3))


def test_a_grid_cuts_remainders_off_and_no_branch_sees_more_than_the_input():
    ours = network()
    assert ours.grid_after(0, 0, 100, 131) == (3, 4)
    assert ours.grid_after(-1, 0, 101, 131) == (25, 32)
    assert network(resolutions_px=(224, 112)).grid_after(0, 0, 100, 131) == (6, 8)


@pytest.mark.parametrize(("blocks", "expected"), [((), (2, 2, 2)), ((1, 2, 3), (1, 2, 3))])
def test_blocks_per_stage_are_given_or_even(blocks, expected):
    assert geometry.stage_blocks(blocks, VIT, 3) == expected


def test_what_is_not_given_is_everywhere_the_same():
    assert geometry.stages_of_levels((), 3, 4) == (3, 3, 3)
    assert geometry.stages_of_levels((1, 3), 2, 4) == (1, 3)
    assert geometry.block_windows((), 3) == (0, 0, 0)
    assert geometry.block_windows((7, 0, 7), 3) == (7, 0, 7)
    assert geometry.num_frozen_blocks(CONVNEXT, "all") == 8
    assert geometry.num_frozen_blocks(CONVNEXT, 3) == 3


def test_windows_pad_a_grid():
    assert geometry.num_cells((5, 9)) == 45
    assert geometry.num_cells((5, 9), 4) == 8 * 12


def test_strides_of_levels_double_as_scales_halve():
    strides = [geometry.level_stride_px(16, scale) for scale in (4.0, 2.0, 1.0, 0.5)]
    assert all(coarse == 2 * fine for fine, coarse in pairwise(strides))
    assert strides[0] == 4
