"""Where DeepSpeed's ZeRO puts each parameter: pure arithmetic on shapes, without files.

Source: ``zero_to_fp32.py`` of DeepSpeed 0.19.8, and checkpoints it wrote. Stages 1 and 2 lay the parameters of a group
end to end and cut the whole into one part per rank; stage 3 cuts every parameter by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from piip_scale.checkpoint.slices import Slice, rank_slice
from piip_scale.errors import CheckpointError

Shape = tuple[int, ...]


def slices_of_mappings(
    shapes: Sequence[Mapping[str, Shape]], ranges: Sequence[Sequence[Mapping[str, tuple[int, int]]]]
) -> dict[str, list[Slice]]:
    """ZeRO stages 1 and 2, where the files say themselves where each parameter is, in whatever order they lie.

    Args:
        shapes: For each parameter group, its parameters' shapes.
        ranges: ``ranges[rank][group]`` names the parameters that the rank has a part of, each with start and length in
            the rank's flat tensor; a parameter's parts follow each other in the order of ranks.

    Returns:
        The slices of each parameter, in order.

    Raises:
        CheckpointError: Shapes and parts do not add up.
    """
    slices: dict[str, list[Slice]] = {}
    for group, named in enumerate(shapes):
        for name, shape in named.items():
            first, parts = 0, []
            for rank, of_rank in enumerate(ranges):
                start, length = of_rank[group].get(name, (0, 0))
                if start < 0 or length < 0:
                    raise _misfit(f"parameter {name} begins at {start} with {length} elements on rank {rank}")
                parts += [Slice(name, first, start, length, rank, group)] if length else []
                first += length
            if first != num_elements(shape):
                raise _misfit(f"parameter {name} of shape {tuple(shape)} has {first} elements in the files")
            slices[name] = parts
    return slices


def num_elements(shape: Shape) -> int:
    """Elements of a tensor.

    Raises:
        CheckpointError: No tensor has such a shape.
    """
    if not all(type(size) is int and size >= 0 for size in shape):
        raise _misfit(f"a parameter has shape {tuple(shape)}")
    return math.prod(shape)


def slices_of_cut_groups(
    shapes: Sequence[Mapping[str, Shape]],
    part_lengths: Sequence[Sequence[int]],
    paddings: Sequence[Sequence[int]] | None = None,
) -> dict[str, list[Slice]]:
    """ZeRO stages 1 and 2.

    Args:
        shapes: For each parameter group, its parameters' shapes in the order of the flat tensor.
        part_lengths: ``part_lengths[rank][group]`` elements of the group are on the rank.
        paddings: Elements of padding behind each parameter of each group; ``None`` for none.

    Returns:
        The slices of each parameter, in order.

    Raises:
        CheckpointError: Shapes and lengths do not add up.
    """
    slices: dict[str, list[Slice]] = {}
    for group, named in enumerate(shapes):
        lengths = [of_rank[group] for of_rank in part_lengths]
        gaps = [0] * len(named) if paddings is None else paddings[group]
        start = 0
        for (name, shape), gap in zip(named.items(), gaps, strict=True):
            slices[name] = _cut(name, group, lengths, start, num_elements(shape))
            if sum(part.length for part in slices[name]) != num_elements(shape):
                raise _misfit(f"parameter {name} of shape {tuple(shape)} ends behind parameter group {group}")
            start += num_elements(shape) + gap
        _check_used(f"parameter group {group}", used=start, held=sum(lengths), align=2 * len(lengths))
    return slices


def slices_of_cut_parameters(
    shapes: Sequence[Mapping[str, Shape]], part_lengths: Sequence[int], num_ranks: int
) -> dict[str, list[Slice]]:
    """ZeRO stage 3: of every parameter each rank holds ceil(elements / ranks), the last ones padded.

    Args:
        shapes: The parameters' shapes in the order of the flat tensors; how they are grouped does not matter.
        part_lengths: Elements of each of a rank's flat tensors, the same on all ranks; no parameter straddles two.
        num_ranks: Ranks among which each parameter is cut.

    Raises:
        CheckpointError: Shapes and lengths do not add up.
    """
    slices: dict[str, list[Slice]] = {}
    group, start = 0, 0
    for name, shape in ((name, shape) for named in shapes for name, shape in named.items()):
        part = math.ceil(num_elements(shape) / num_ranks)
        while group < len(part_lengths) and start == part_lengths[group]:
            group, start = group + 1, 0
        if group == len(part_lengths) or start + part > part_lengths[group]:
            raise _misfit(f"parameter {name} of shape {tuple(shape)} does not fit into flat tensor {group}")
        slices[name] = slices_of_parts(name, num_elements(shape), part, num_ranks, group, start)
        start += part
    if group < len(part_lengths) - 1 or (part_lengths and start != part_lengths[-1]):
        raise _misfit(f"{start} of {part_lengths[group]} elements of flat tensor {group} belong to a parameter")
    return slices


def slices_of_parts(name: str, numel: int, part: int, num_ranks: int, group: int = 0, start: int = 0) -> list[Slice]:
    """A parameter cut into parts of ``part`` elements, each at ``start`` of its rank's flat tensor; empty ones not."""
    cut = (rank_slice(name, numel, part, rank, group=group, start=start) for rank in range(num_ranks))
    return [held for held in cut if held.length]


def _cut(name: str, group: int, lengths: Sequence[int], start: int, numel: int) -> list[Slice]:
    """The slices of a parameter that begins at ``start`` of all ranks' parts end to end."""
    slices, begin = [], 0
    for rank, held in enumerate(lengths):
        # The rank's whole part, in the parameter's own coordinates; what lies outside of these is not the parameter's.
        part = Slice(name, begin - start, 0, held, rank, group).within(0, numel)
        slices += [part] if part else []
        begin += held
    return slices


def _check_used(what: str, used: int, held: int, align: int) -> None:
    # DeepSpeed aligns groups to twice the ranks and drops a part of that padding when it saves.
    if math.ceil(used / align) != math.ceil(held / align):
        raise _misfit(f"{what} holds {held} elements and its shapes take {used}")


def _misfit(problem: str) -> CheckpointError:
    return CheckpointError(
        problem,
        rule="this version reads the layout of DeepSpeed 0.19",
        fix="convert with the DeepSpeed version that wrote the checkpoint, or save it again with this one",
    )
