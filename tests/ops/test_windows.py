import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from piip_scale.ops.windows import join_windows, split_windows

side = st.integers(1, 9)


@settings(max_examples=60)
@given(height=side, width=side, size=st.integers(1, 6), batch=st.integers(1, 3))
def test_join_undoes_split(height, width, size, batch):
    grid = torch.randn(batch, height, width, 2)
    windows = split_windows(grid, size)
    assert windows.shape == (batch * -(-height // size) * -(-width // size), size * size, 2)
    assert torch.equal(join_windows(windows, size, height, width), grid)


def test_windows_by_hand():
    grid = torch.arange(1, 13).view(1, 3, 4, 1)
    windows = split_windows(grid, 2).squeeze(-1).tolist()
    assert windows == [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 0, 0], [11, 12, 0, 0]]
