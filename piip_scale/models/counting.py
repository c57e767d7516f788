"""How many parameters a network has and how many multiply-accumulates an image costs, part by part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from piip_scale.config.model import (
    BranchConfig,
    ClassifierConfig,
    ConvNextBranchConfig,
    InteractionConfig,
    PiipConfig,
    VitBranchConfig,
)
from piip_scale.models.branch import FeatureSpec
from piip_scale.models.classifier import PiipClassifier
from piip_scale.models.piip import PIIP
from piip_scale.models.trunk import Trunk

Grid = tuple[int, int]

MACS_PER_SAMPLE = 5
"""Of a bilinear sample and its weight, for each channel of the query: the convention of the published counts."""
_FFN_KERNEL = _MERGE_KERNEL = 3
_CONVNEXT_KERNEL, _CONVNEXT_RATIO = 7, 4


@dataclass(frozen=True)
class Convention:
    """What a count includes.

    Attributes:
        padded_attention: Count a window's padded tokens in its attention, as they are computed.
        padded_qkv: Count them in the projection to queries, keys and values.
        simple_merge_kernels: Sides of the kernels that bring a branch to the common width before a simple pyramid.
    """

    padded_attention: bool = True
    padded_qkv: bool = True
    simple_merge_kernels: tuple[int, ...] = (3, 3)


AS_COMPUTED = Convention()
PUBLISHED = Convention(padded_attention=False, simple_merge_kernels=(1,))
"""The published counts: attention without padding, and one 1x1 kernel a branch where the released code has two 3x3."""
PUBLISHED_UNPADDED = Convention(padded_attention=False, padded_qkv=False, simple_merge_kernels=(1,))
"""Some published rows leave the padding out of the qkv projection too."""


@dataclass(frozen=True)
class PartCount:
    """A part of a network.

    Attributes:
        name: ``branch 1`` (the largest model) ..., ``interaction 1`` ..., ``merging``, ``pyramid``, or what follows it.
        parameters: Parameters.
        macs: Multiply-accumulates of one image in linear layers, convolutions and products of attention.
        sampling_macs: Those of deformable attention's sampling, which torch's counter does not see: for each query and
            point, 5 for each channel of the values (four corners and the attention's weight).
        note: What the count takes for granted.
    """

    name: str
    parameters: int
    macs: int
    sampling_macs: int = 0
    note: str = ""

    @property
    def total_macs(self) -> int:
        """All multiply-accumulates of one image."""
        return self.macs + self.sampling_macs


def count_network(
    config: PiipConfig,
    height_px: int,
    width_px: int,
    head: ClassifierConfig | None = None,
    convention: Convention = AS_COMPUTED,
) -> tuple[PartCount, ...]:
    """Counts a network for one image.

    Args:
        config: The network.
        height_px: Height of its input, at the last branch's resolution.
        width_px: Width likewise.
        head: Counts the classifier with this head instead of the feature pyramid.
        convention: What to include.

    Returns:
        Branches, interactions, merging (of more than one branch without separate heads), then pyramid or head.
    """
    model = _build(config, head)
    grids = [_grids(config, index, height_px, width_px) for index in range(len(config.branches))]
    parts = [
        PartCount(f"branch {index + 1}", num_parameters(module), _branch_macs(branch, grid, convention))
        for index, (module, branch, grid) in enumerate(zip(model.branches, config.branches, grids, strict=True))
    ]
    for stage, units in enumerate(model.interactions):
        if len(config.branches) > 1:
            macs, sampling = _stage_macs(config, stage, grids)
            parts.append(PartCount(f"interaction {stage + 1}", num_parameters(units), macs, sampling))
    return (*parts, *_rest(model, grids, convention))


def feature_maps(config: PiipConfig, height_px: int, width_px: int) -> tuple[tuple[FeatureSpec, Tensor], ...]:
    """What the network hands to a neck: each map's spec, and the map of one image on the meta device."""
    model = _build(config, None)
    assert isinstance(model, PIIP)
    grids = _grids(config, len(config.branches) - 1, height_px, width_px)
    sources = [grids[config.last_blocks(len(config.branches) - 1)[stage]] for stage in config.level_stages()]
    sizes = [[int(side * scale) for side in grid] for grid, scale in zip(sources, config.pyramid.scales, strict=True)]
    maps = (
        torch.empty(1, spec.channels, *size, device="meta")
        for spec, size in zip(model.feature_specs, sizes, strict=True)
    )
    return tuple(zip(model.feature_specs, maps, strict=True))


# Building takes longer than counting, and several conventions count one network.
@lru_cache(maxsize=4)
def _build(config: PiipConfig, head: ClassifierConfig | None) -> Trunk:
    with torch.device("meta"):
        return PIIP(config) if head is None else PiipClassifier(config, head)


def _rest(model: Trunk, grids: list[list[Grid]], convention: Convention) -> list[PartCount]:
    config = model.config
    if isinstance(model, PiipClassifier):
        return [PartCount("head", num_parameters(model.head), _head_macs(model, grids))]
    assert isinstance(model, PIIP)
    merging = sum(_merging_macs(config, stage, grids, convention) for stage in set(config.level_stages()))
    parts = [PartCount("merging", num_parameters(model.mergings), merging)] if len(config.branches) > 1 else []
    return [*parts, PartCount("pyramid", num_parameters(model.pyramid), _pyramid_macs(config, grids))]


def num_parameters(module: nn.Module) -> int:
    """Parameters of a module, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())


def _grids(config: PiipConfig, index: int, height_px: int, width_px: int) -> list[Grid]:
    """A branch's grid after each of its blocks."""
    branch = config.branches[index]
    scale = min(1.0, branch.resolution_px / config.branches[-1].resolution_px)
    sides = [math.floor(side * scale) for side in (height_px, width_px)]
    strides = [branch.stride_after_px(block) for block in range(branch.depth)]
    return [(sides[0] // stride, sides[1] // stride) for stride in strides]


def _cells(grid: Grid) -> int:
    return grid[0] * grid[1]


def _branch_macs(branch: BranchConfig, grids: list[Grid], convention: Convention) -> int:
    if isinstance(branch, ConvNextBranchConfig):
        return _convnext_macs(branch, grids)
    embedding = _cells(grids[0]) * 3 * branch.patch_size_px**2 * branch.embed_dim
    windows = branch.window_size_tokens or (0,) * branch.depth
    return embedding + sum(_block_macs(branch, grids[0], window, convention) for window in windows)


def _block_macs(branch: VitBranchConfig, grid: Grid, window: int, convention: Convention) -> int:
    dim, tokens = branch.embed_dim, _cells(grid) + branch.class_token
    padded = math.prod(-(-side // window) * window for side in grid) if window else tokens
    projected = padded if convention.padded_qkv else tokens
    attended = padded if convention.padded_attention else tokens
    attention = 2 * attended * (window**2 if window else tokens) * dim
    mlp = 2 * tokens * dim * int(dim * branch.mlp_ratio)
    return projected * 3 * dim**2 + attention + tokens * dim**2 + mlp


def _convnext_macs(branch: ConvNextBranchConfig, grids: list[Grid]) -> int:
    macs = _cells(grids[0]) * 3 * branch.stride_after_px(0) ** 2 * branch.widths[0]
    for block, grid in enumerate(grids):
        dim, before = branch.width_after(block), branch.width_after(max(block - 1, 0))
        if block and branch.stage_of(block) != branch.stage_of(block - 1):
            macs += _cells(grid) * 4 * before * dim
        else:
            macs += _cells(grid) * (_CONVNEXT_KERNEL**2 * dim + 2 * _CONVNEXT_RATIO * dim**2)
    return macs


def _stage_macs(config: PiipConfig, stage: int, grids: list[list[Grid]]) -> tuple[int, int]:
    """MACs of a stage's units, and of their sampling."""
    ends = [_end(config, index, stage, grids) for index in range(len(config.branches))]
    macs = sampling = 0
    for (large_cells, large_dim), (small_cells, small_dim) in pairwise(ends):
        unit = config.interaction
        if unit.projection:
            macs += (large_cells + small_cells) * large_dim * small_dim
        to_large = large_dim if unit.projection else small_dim
        to_small = small_dim if unit.projection else large_dim
        for query, source in (
            ((large_cells, large_dim), (small_cells, to_large)),
            ((small_cells, small_dim), (large_cells, to_small)),
        ):
            macs += _injection_macs(unit, *query, *source)
            if unit.attention == "deform":
                sampling += MACS_PER_SAMPLE * query[0] * unit.num_points * query[1]
    return macs, sampling


def _injection_macs(unit: InteractionConfig, cells: int, dim: int, source_cells: int, source_dim: int) -> int:
    hidden = int(dim * unit.ffn_ratio)
    ffn = cells * (2 * dim * hidden + _FFN_KERNEL**2 * hidden)
    if unit.attention == "cross":
        projections = cells * 2 * dim**2 + source_cells * 2 * source_dim * dim
        return ffn + projections + 2 * cells * source_cells * dim
    value_dim = int(dim * unit.value_ratio)
    choices = cells * dim * unit.num_heads * unit.num_points * 3
    return ffn + choices + source_cells * source_dim * value_dim + cells * value_dim * dim


def _merging_macs(config: PiipConfig, stage: int, grids: list[list[Grid]], convention: Convention) -> int:
    if len(config.branches) == 1:
        return 0
    ends = [_end(config, index, stage, grids) for index in range(len(config.branches))]
    merged = ends[0][1]
    if config.pyramid.kind == "regular":
        # The first branch has the common width already.
        return sum(_MERGE_KERNEL**2 * cells * dim * merged for cells, dim in ends[1:])
    first, *others = (kernel**2 for kernel in convention.simple_merge_kernels)
    return sum(cells * merged * (first * dim + sum(others) * merged) for cells, dim in ends)


def _pyramid_macs(config: PiipConfig, grids: list[list[Grid]]) -> int:
    macs = 0
    for stage, scale in zip(config.level_stages(), config.pyramid.scales, strict=True):
        cells, dim = _end(config, -1, stage, grids)[0], _end(config, 0, stage, grids)[1]
        # A doubling has one kernel of 2x2 for each of its outputs' cells: 4 products of channels for each cell before.
        doublings = int(math.log2(scale)) if scale > 1 else 0
        macs += sum(4 ** (step + 1) * cells * dim**2 for step in range(doublings))
    return macs


def _head_macs(model: PiipClassifier, grids: list[list[Grid]]) -> int:
    config, head = model.config, model.head_config
    stage = config.interaction.num_stages - 1
    ends = [_end(config, index, stage, grids) for index in range(len(config.branches))]
    if head.separate:
        return sum(dim * head.num_classes for _, dim in ends)
    return ends[0][1] * head.num_classes + sum(cells * dim * ends[0][1] for cells, dim in ends[1:])


def _end(config: PiipConfig, index: int, stage: int, grids: list[list[Grid]]) -> tuple[int, int]:
    """A branch's cells and width after a stage."""
    last = config.last_blocks(index)[stage]
    return _cells(grids[index][last]), config.branches[index].width_after(last)
