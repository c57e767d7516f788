"""Rotary positions for a branch's blocks, made once for a batch of images."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from piip_scale.config.branches import RotaryConfig, VitBranchConfig
from piip_scale.geometry import block_windows
from piip_scale.ops.rotary import centred_places, counted_places, rotary_table
from piip_scale.ops.windows import split_windows


class RotaryPositions(nn.Module):
    """The tables that turn a branch's queries and keys.

    Args:
        config: The branch.
        rotary: Its rotary positions.
    """

    def __init__(self, config: VitBranchConfig, rotary: RotaryConfig) -> None:
        super().__init__()
        self.config, self.rescale = rotary, rotary.rescale
        self.head_size, self.num_prefix = config.embed_dim // config.num_heads, config.prefix_tokens
        self.windows = sorted(set(block_windows(config.window_size_tokens, config.depth)))

    def forward(self, grid_BHWC: Tensor) -> dict[int, Tensor]:
        """A table for each size of windows, 0 for full attention.

        Args:
            grid_BHWC: The branch's tokens; only their grid, dtype and device are looked at.

        Returns:
            (2, 1, prefix + H * W, pairs of a head) for full attention, where tokens before the cells are not turned;
            (2, windows, cells, pairs of a head) for windows, or one for all of them.
        """
        height, width = grid_BHWC.shape[1:3]
        like = grid_BHWC.new_empty(0, dtype=torch.promote_types(grid_BHWC.dtype, torch.float32))
        factor = self._draw(like)
        return {window: self._table(like, height, width, window, factor) for window in self.windows}

    def _draw(self, like: Tensor) -> Tensor | None:
        if not self.training or self.rescale == 1:
            return None
        reach = math.log(self.rescale)
        return like.new_empty(()).uniform_(-reach, reach).exp()

    def _table(self, like: Tensor, height: int, width: int, window: int, factor: Tensor | None) -> Tensor:
        if window and self.config.windows == "window":
            table_2HWP = self._grid_table(like, (window, window), (window, window), factor)
            return table_2HWP.flatten(1, 2)[:, None]
        if window:
            padded = (height + -height % window, width + -width % window)
            windows_NLP = split_windows(self._grid_table(like, padded, (height, width), factor), window)
            return windows_NLP.view(2, -1, *windows_NLP.shape[1:])
        cells_2LP = self._grid_table(like, (height, width), (height, width), factor).flatten(1, 2)
        # A cosine of 1 and a sine of 0 leave a token as it is, to the last bit.
        cosines, sines = (
            functional.pad(part, (0, 0, self.num_prefix, 0), value=value)
            for part, value in zip(cells_2LP, (1.0, 0.0), strict=True)
        )
        return torch.stack((cosines, sines)).unsqueeze(1)

    def _grid_table(self, like: Tensor, grid: tuple[int, int], image: tuple[int, int], factor: Tensor | None) -> Tensor:
        """Of all cells of a grid (2, H, W, pairs of a head), where the image has as many cells as told."""
        sides = {"own": image, "shorter": (min(image),) * 2, "longer": (max(image),) * 2}[self.config.normalise]
        rows, columns = (
            self._places(side)(torch.arange(cells, device=like.device, dtype=like.dtype))
            for cells, side in zip(grid, sides, strict=True)
        )
        if factor is not None:
            rows, columns = rows * factor, columns * factor
        down, right = (places.flatten() for places in torch.meshgrid(rows, columns, indexing="ij"))
        first, second = (down, right) if self.config.first == "rows" else (right, down)
        cells_2NP = rotary_table(first, second, self.head_size, self.config.base)
        return cells_2NP.view(2, *grid, -1)

    def _places(self, side: int) -> Callable[[Tensor], Tensor]:
        config = self.config
        if config.coordinates == "centred":
            return partial(centred_places, side=side)
        return partial(counted_places, side=side, pretrain_side=config.pretrain_grid_cells, offset=config.offset_cells)
