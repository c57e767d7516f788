"""What the layers of a network compute for one image, forward and backward, from the config's numbers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from piip_scale.config.branches import BranchConfig, ConvNextBranchConfig, LoraConfig, VitBranchConfig
from piip_scale.config.interaction import InteractionConfig
from piip_scale.config.model import ClassifierConfig, PiipConfig
from piip_scale.geometry import (
    Grid,
    block_windows,
    depth_of,
    drop_path_rate,
    is_downsampling,
    num_cells,
    num_frozen_blocks,
    scaled_width,
    section_at,
)
from piip_scale.models.layers import computed_share
from piip_scale.models.work import Work, layer, product, total

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
class End:
    """A branch where it meets the others.

    Attributes:
        cells: Of its grid.
        dim: Channels.
        upstream: Whether its features have a gradient: something below them is trained.
    """

    cells: int
    dim: int
    upstream: bool


class NetworkWork:
    """The arithmetic of one network on images of one size.

    Args:
        config: The network.
        height_px: Height of its input, at the last branch's resolution.
        width_px: Width likewise.
        convention: What to include.
        training_batch: Images of a training's micro-batch, of which stochastic depth may skip some; ``None`` counts an
            evaluation.
    """

    def __init__(
        self, config: PiipConfig, height_px: int, width_px: int, convention: Convention, training_batch: int | None
    ) -> None:
        self.config, self._convention, self._batch = config, convention, training_batch
        self._geometry = config.geometry
        self._grids = [
            [self._geometry.grid_after(index, block, height_px, width_px) for block in range(depth_of(branch.sections))]
            for index, branch in enumerate(config.branches)
        ]

    def branch(self, index: int) -> Work:
        """Of a branch, its embedding included."""
        config, grids = self.config.branches[index], self._grids[index]
        # No image has a gradient, and the embedding is frozen with the first block.
        trained = not _num_frozen(config) and _lora_of(config) is None
        embedding = layer(_embedding_macs(config, grids[0]), trained=trained, upstream=False)
        return embedding + total(self._block(index, block) for block in range(len(grids)))

    def stage(self, stage: int) -> tuple[Work, Work]:
        """Of a stage's units, and of their sampling."""
        ends = [self._before_units(index, stage) for index in range(len(self.config.branches))]
        work = sampling = Work()
        for pair, (large, small) in enumerate(pairwise(ends)):
            # Units run from the last pair down: the smaller model of all but the last has been through one.
            met = pair + 1 < len(ends) - 1 and self._receives(pair + 1, from_small=True)
            units, samples = self._unit(large, End(small.cells, small.dim, small.upstream or met))
            work, sampling = work + units, sampling + samples
        return work, sampling

    def merging(self, stage: int) -> Work:
        """Of bringing all branches to one width, for the levels taken after a stage."""
        ends = self.ends(stage)
        if len(ends) == 1:
            return Work()
        merged = ends[0].dim
        if self.config.pyramid.kind == "regular":
            # The first branch has the common width already.
            return total(layer(_MERGE_KERNEL**2 * end.cells * end.dim * merged) for end in ends[1:])
        first, *others = (kernel**2 for kernel in self._convention.simple_merge_kernels)
        return total(
            layer(end.cells * merged * first * end.dim, upstream=end.upstream)
            + layer(end.cells * merged * sum(others) * merged)
            for end in ends
        )

    def pyramid(self) -> Work:
        """Of enlarging the merged map, level by level."""
        work = Work()
        for stage, scale in zip(self._geometry.level_stages, self._geometry.level_scales, strict=True):
            ends = self.ends(stage)
            # A doubling has one kernel of 2x2 for each of its outputs' cells: 4 products of channels for each cell.
            for step in range(int(math.log2(scale)) if scale > 1 else 0):
                macs = 4 ** (step + 1) * ends[-1].cells * ends[0].dim ** 2
                work += layer(macs, upstream=step > 0 or ends[-1].upstream)
        return work

    def class_head(self, head: ClassifierConfig) -> Work:
        """Of a classifier's head; its norms are trained, so that its layers' inputs have gradients."""
        ends = self.ends(self.config.interaction.num_stages - 1)
        if head.separate:
            return layer(sum(end.dim * head.num_classes for end in ends))
        merged = ends[0].dim
        return layer(merged * head.num_classes + sum(end.cells * end.dim * merged for end in ends[1:]))

    def ends(self, stage: int) -> list[End]:
        """All branches after a stage and its units."""
        ends = [self._before_units(index, stage) for index in range(len(self.config.branches))]
        return [End(end.cells, end.dim, end.upstream or self._receives(index)) for index, end in enumerate(ends)]

    def _before_units(self, index: int, stage: int) -> End:
        last = self._geometry.last_block(index, stage)
        upstream = self._upstream(index, last) or last >= _num_frozen(self.config.branches[index])
        width = self._geometry.section_after(index, stage).width
        return End(num_cells(self._grids[index][last]), width, upstream)

    def _upstream(self, index: int, block: int) -> bool:
        """Whether what enters a block has a gradient: a block below it is trained, or units, which always are."""
        frozen = _num_frozen(self.config.branches[index])
        met = self._receives(index) and block > self._geometry.last_block(index, 0)
        return (frozen == 0 and _lora_of(self.config.branches[index]) is None) or block > frozen or met

    def _receives(self, index: int, *, from_small: bool = False) -> bool:
        """Whether units change a branch: any of its own, or that with the smaller model next to it."""
        has_smaller = index < len(self.config.branches) - 1 and self.config.interaction.direction == "both"
        return has_smaller or (index > 0 and not from_small)

    def _block(self, index: int, block: int) -> Work:
        branch, grid = self.config.branches[index], self._grids[index][block]
        trained, upstream = block >= _num_frozen(branch), self._upstream(index, block)
        if isinstance(branch, ConvNextBranchConfig):
            work = _convnext_work(branch, block, grid, trained, upstream)
        else:
            window = block_windows(branch.window_size_tokens, branch.depth)[block]
            work = _vit_work(branch, grid, window, self._convention, trained, upstream)
        rate = drop_path_rate(branch.sections, block, branch.drop_path_rate, branch.drop_path_schedule)
        # Frozen blocks drop no paths.
        return work.of_share(self._share(rate if trained else 0.0, branch.drop_path_mode))

    def _share(self, rate: float, mode: str) -> float:
        return 1.0 if self._batch is None else computed_share(rate, mode, self._batch)

    def _unit(self, large: End, small: End) -> tuple[Work, Work]:
        unit = self.config.interaction
        work = sampling = Work()
        for query, source in [(small, large)] if unit.direction == "to_small" else [(large, small), (small, large)]:
            if unit.projection:
                work += layer(source.cells * source.dim * query.dim, upstream=source.upstream)
                source = End(source.cells, query.dim, True)
            work += self._injection(unit, query, source)
            if unit.attention == "deform":
                sampling += product(MACS_PER_SAMPLE * query.cells * unit.num_points * query.dim)
        return work, sampling

    def _injection(self, unit: InteractionConfig, query: End, source: End) -> Work:
        # Trained norms give their outputs a gradient whatever lies below them.
        normed = unit.norm != "none"
        asks, shows = normed or query.upstream, normed or source.upstream
        dim, hidden = query.dim, scaled_width(query.dim, unit.ffn_ratio)
        ffn = layer(query.cells * (2 * dim * hidden + _FFN_KERNEL**2 * hidden))
        work = ffn.of_share(self._share(unit.drop_path_rate, unit.drop_path_mode))
        if unit.attention == "cross":
            work += layer(query.cells * dim**2, upstream=asks) + layer(query.cells * dim**2)
            work += layer(2 * source.cells * source.dim * dim, upstream=shows)
            return work + product(2 * query.cells * source.cells * dim)
        value_dim = scaled_width(dim, unit.value_ratio)
        choices = query.cells * dim * unit.num_heads * unit.num_points * 3
        work += layer(choices, upstream=asks) + layer(source.cells * source.dim * value_dim, upstream=shows)
        return work + layer(query.cells * value_dim * dim)


def _num_frozen(branch: BranchConfig) -> int:
    return num_frozen_blocks(branch.sections, branch.frozen_blocks)


def _lora_of(branch: BranchConfig) -> LoraConfig | None:
    return branch.lora if isinstance(branch, VitBranchConfig) else None


def _embedding_macs(branch: BranchConfig, grid: Grid) -> int:
    first = branch.sections[0]
    return num_cells(grid) * 3 * first.stride_px**2 * first.width


def _vit_work(
    branch: VitBranchConfig, grid: Grid, window: int, convention: Convention, trained: bool, upstream: bool
) -> Work:
    dim, prefix, cells, hidden = branch.embed_dim, branch.prefix_tokens, num_cells(grid), branch.hidden_dim
    tokens, padded = prefix + cells, num_cells(grid, window) if window else cells
    projected = prefix + (padded if convention.padded_qkv else cells)
    attended = padded if convention.padded_attention else cells
    # A window's cells see each other and the tokens before the grid; those see everything.
    pairs = attended * (window**2 + prefix) + prefix * tokens if window else tokens**2
    lora, opening = branch.lora if trained else None, 2 if branch.feed_forward == "swiglu" else 1
    # A trained block begins with a trained norm: inside it everything has a gradient. Low-rank additions have theirs.
    inside = upstream or (trained and lora is None)
    work = Work()
    for target, rows, dim_in, dim_out, num_layers in (
        ("qkv", projected, dim, 3 * dim, 1),
        ("scores", pairs, dim, 2, 1),
        ("proj", tokens, dim, dim, 1),
        ("mlp", tokens, dim, hidden, opening),
        ("mlp", tokens, hidden, dim, 1),
    ):
        if target == "scores":
            work += product(rows * dim_in * dim_out, upstream=inside)
            continue
        work += layer(num_layers * rows * dim_in * dim_out, trained=trained and lora is None, upstream=inside)
        if lora is not None and target in lora.targets:
            work += layer(num_layers * rows * dim_in * lora.rank, upstream=inside)
            work += layer(num_layers * rows * lora.rank * dim_out)
            inside = True
    return work


def _convnext_work(branch: ConvNextBranchConfig, block: int, grid: Grid, trained: bool, upstream: bool) -> Work:
    sections, cells = branch.sections, num_cells(grid)
    dim, inside = section_at(sections, block).width, trained or upstream
    if is_downsampling(sections, block):
        before = section_at(sections, block - 1).width
        return layer(cells * 4 * before * dim, trained=trained, upstream=inside)
    # Here the norm comes after the convolution.
    convolution = layer(cells * _CONVNEXT_KERNEL**2 * dim, trained=trained, upstream=upstream)
    mlp = layer(cells * 2 * _CONVNEXT_RATIO * dim**2, trained=trained, upstream=inside)
    return convolution + mlp
