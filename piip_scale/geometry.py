"""Arithmetic about a network, over plain numbers: blocks and stages, widths, strides, grids, levels, rates by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

GROUPS = 32
"""Groups of every group norm."""

_STEM_PX = 4
"""Pixels per cell of ConvNeXt's stem; each later section doubles them."""

Grid = tuple[int, int]
"""Rows and columns of cells."""


@dataclass(frozen=True)
class Section:
    """Consecutive blocks of a branch that have one width and one stride.

    Attributes:
        num_blocks: Blocks; in every section but a branch's first, the downsampling that opens it is one of them.
        width: Channels after each.
        stride_px: Pixels of the branch's own input per cell after each.
    """

    num_blocks: int
    width: int
    stride_px: int


Sections = tuple[Section, ...]


def convnext_sections(depths: Sequence[int], widths: Sequence[int]) -> Sections:
    """A ConvNeXt's own stages, of so many layers and channels, downsampling left out of ``depths``."""
    return tuple(
        Section(depth + (index > 0), width, _STEM_PX << index)
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True))
    )


def depth_of(sections: Sections) -> int:
    """Blocks of a branch, downsampling included."""
    return sum(section.num_blocks for section in sections)


def locate(sections: Sections, block: int) -> tuple[int, int]:
    """The section that a block belongs to, and its index there."""
    lasts = list(accumulate(section.num_blocks for section in sections))
    index = sum(block >= last for last in lasts)
    return index, block - (lasts[index] - sections[index].num_blocks)


def section_at(sections: Sections, block: int) -> Section:
    """The section that a block belongs to: width and stride after it."""
    return sections[locate(sections, block)[0]]


def is_downsampling(sections: Sections, block: int) -> bool:
    """Whether a block opens a later section."""
    section, index = locate(sections, block)
    return section > 0 and index == 0


def drop_path_rate(sections: Sections, block: int, rate: float, schedule: str) -> float:
    """The rate of a block; downsamplings drop no paths and do not count.

    Args:
        sections: The branch.
        block: Index of the block.
        rate: The branch's rate: the last block's.
        schedule: ``constant``, or ``linear`` from 0 in the first block.
    """
    if is_downsampling(sections, block):
        return 0.0
    dropping = depth_of(sections) - (len(sections) - 1)
    if schedule == "constant" or dropping == 1:
        return rate
    return rate * (block - locate(sections, block)[0]) / (dropping - 1)


def num_frozen_blocks(sections: Sections, frozen_blocks: int | str) -> int:
    """How many first blocks are frozen; ``all`` is every one."""
    return depth_of(sections) if frozen_blocks == "all" else int(frozen_blocks)


def block_windows(sizes_tokens: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The window of each block, 0 for full attention, which is everywhere where no sizes are given."""
    return sizes_tokens or (0,) * depth


def scaled_width(width: int, ratio: float) -> int:
    """Channels inside a layer, as a ratio of those outside."""
    return int(width * ratio)


def num_cells(grid: Grid, window_tokens: int = 0) -> int:
    """Cells of a grid, padded to whole windows where there are any."""
    return math.prod(-(-side // window_tokens) * window_tokens if window_tokens else side for side in grid)


def stage_blocks(given: tuple[int, ...], sections: Sections, num_stages: int) -> tuple[int, ...]:
    """Blocks that a branch runs in each stage: those given, or its depth evenly divided."""
    return given or (depth_of(sections) // num_stages,) * num_stages


def last_blocks(blocks_per_stage: Sequence[int]) -> tuple[int, ...]:
    """Index of the last block of each stage."""
    return tuple(total - 1 for total in accumulate(blocks_per_stage))


def stages_of_levels(given: tuple[int, ...], num_levels: int, num_stages: int) -> tuple[int, ...]:
    """The stage after which each level of a pyramid is taken: those given, or the last for all."""
    return given or (num_stages - 1,) * num_levels


def level_stride_px(stride_px: int, scale: float) -> int:
    """Stride of a level whose size is ``scale`` times that of a map; a whole number in every valid pyramid."""
    return round(stride_px / scale)


@dataclass(frozen=True)
class NetworkGeometry:
    """A network's branches, stages and levels.

    Attributes:
        resolutions_px: Image size of each branch; only ratios matter.
        sections: Of each branch.
        blocks_per_stage: Of each branch.
        level_stages: The stage after which each level of the pyramid is taken.
        level_scales: Each level's size over the last branch's grid after that stage.
    """

    resolutions_px: tuple[int, ...]
    sections: tuple[Sections, ...]
    blocks_per_stage: tuple[tuple[int, ...], ...]
    level_stages: tuple[int, ...]
    level_scales: tuple[float, ...]

    def last_block(self, branch: int, stage: int) -> int:
        """Index of the last block that a branch runs in a stage."""
        return last_blocks(self.blocks_per_stage[branch])[stage]

    def section_after(self, branch: int, stage: int) -> Section:
        """Width and stride of a branch after a stage."""
        return section_at(self.sections[branch], self.last_block(branch, stage))

    def coarsest_stride_px(self) -> int:
        """Stride of the smallest level, in pixels of the network's input."""
        levels = zip(self.level_stages, self.level_scales, strict=True)
        return max(level_stride_px(self.section_after(-1, stage).stride_px, scale) for stage, scale in levels)

    def grid_after(self, branch: int, block: int, height_px: int, width_px: int) -> Grid:
        """A branch's grid after a block, for a network's input of that size: remainders are cut off."""
        scale = min(1.0, self.resolutions_px[branch] / self.resolutions_px[-1])
        stride = section_at(self.sections[branch], block).stride_px
        return math.floor(height_px * scale) // stride, math.floor(width_px * scale) // stride

    def level_grids(self, height_px: int, width_px: int) -> tuple[Grid, ...]:
        """The grid of each level, for a network's input of that size."""
        grids = (self.grid_after(-1, self.last_block(-1, stage), height_px, width_px) for stage in self.level_stages)
        return tuple(
            (int(rows * scale), int(columns * scale))
            for (rows, columns), scale in zip(grids, self.level_scales, strict=True)
        )
