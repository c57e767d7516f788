import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from piip_scale.ops.windows import gather_windows, join_windows, split_windows

side = st.integers(1, 9)


@settings(max_examples=60)
@given(height=side, width=side, size=st.integers(1, 6), batch=st.integers(1, 3))
def test_join_undoes_split(height, width, size, batch):
    grid = torch.randn(batch, height, width, 2)
    windows = split_windows(grid, size)
    assert windows.shape == (batch * -(-height // size) * -(-width // size), size * size, 2)
    assert torch.equal(join_windows(windows, size, height, width), grid)
    gathered = gather_windows(windows, size, height, width)
    in_order = gathered.sort(1).values
    assert torch.equal(in_order, grid.flatten(1, 2).sort(1).values)


def test_windows_by_hand():
    grid = torch.arange(1, 13).view(1, 3, 4, 1)
    windows = split_windows(grid, 2).squeeze(-1).tolist()
    assert windows == [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 0, 0], [11, 12, 0, 0]]


def test_cells_of_windows_that_divide_a_grid_are_gathered_without_a_copy():
    # As values lie in a projection.
    windows = split_windows(torch.randn(2, 4, 6, 9), 2)[..., 3:6]
    gathered = gather_windows(windows, 2, 4, 6)
    assert gathered.shape == (2, 24, 3)
    assert gathered.data_ptr() == windows.data_ptr()
