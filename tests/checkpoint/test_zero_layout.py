import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zero_files import write_checkpoint

from piip_scale.checkpoint.layout import slices_of_cut_groups, slices_of_cut_parameters
from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.errors import CheckpointError

SHAPES = st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=5)


def named(prefix, shapes, dtype=torch.float32):
    return {f"{prefix}.{index}": torch.randn(shape).to(dtype) for index, shape in enumerate(shapes)}


@settings(max_examples=60, deadline=None)
@given(
    stage=st.sampled_from([1, 2, 3]),
    num_ranks=st.integers(1, 5),
    shapes=st.lists(SHAPES, min_size=1, max_size=3),
    frozen=SHAPES,
    trimmed=st.booleans(),
    sub_groups=st.integers(1, 3),
)
def test_any_split_reads_back(tmp_path_factory, stage, num_ranks, shapes, frozen, trimmed, sub_groups):
    folder = tmp_path_factory.mktemp("zero")
    groups = [named(f"group{index}", of_group) for index, of_group in enumerate(shapes)]
    still = named("frozen", frozen, torch.bfloat16)
    buffers = {"table": torch.arange(3), "mean": torch.randn(2)}
    write_checkpoint(folder, stage, num_ranks, groups, still, buffers, trimmed, sub_groups)
    wanted = {name: tensor for group in [*groups, still, buffers] for name, tensor in group.items()}
    reader = ZeroCheckpoint(folder)
    assert reader.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert reader[name].dtype == tensor.dtype
        assert torch.equal(reader[name], tensor), name


@given(st.integers(1, 7), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_slices_cover_each_parameter_once(num_ranks, sizes):
    shapes = [{str(index): (size,) for index, size in enumerate(sizes)}]
    aligned = 2 * math.ceil(sum(sizes) / (2 * num_ranks))
    cut_group = slices_of_cut_groups(shapes, [[aligned]] * num_ranks)
    cut_each = slices_of_cut_parameters(shapes, [sum(math.ceil(size / num_ranks) for size in sizes)], num_ranks)
    for slices in (cut_group, cut_each):
        assert [sum(part.length for part in slices[str(i)]) for i in range(len(sizes))] == sizes
        taken = [(p.rank, p.start + offset) for run in slices.values() for p in run for offset in range(p.length)]
        assert len(taken) == len(set(taken))


def test_padding_between_parameters_is_skipped():
    slices = slices_of_cut_groups([{"a": (3,), "b": (2,)}], [[4], [4]], paddings=[[1, 2]])
    assert [(p.rank, p.start, p.length) for p in slices["a"]] == [(0, 0, 3)]
    assert [(p.rank, p.start, p.length) for p in slices["b"]] == [(1, 0, 2)]


def test_a_group_too_short_for_its_shapes_is_refused():
    with pytest.raises(CheckpointError, match=r"parameter b of shape \(9,\) ends behind parameter group 0"):
        slices_of_cut_groups([{"a": (3,), "b": (9,)}], [[4], [4]])
    with pytest.raises(CheckpointError, match="holds 80 elements and its shapes take 3"):
        slices_of_cut_groups([{"a": (3,)}], [[40], [40]])


def test_flat_tensors_that_no_parameter_fills_are_refused():
    with pytest.raises(CheckpointError, match="3 of 4 elements of flat tensor 0"):
        slices_of_cut_parameters([{"a": (5,)}], [4], num_ranks=2)
    with pytest.raises(CheckpointError, match="does not fit"):
        slices_of_cut_parameters([{"a": (5,)}], [2], num_ranks=2)
