"""What the pyramid network asks of a branch, whatever its architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from piip_scale.errors import ModelError


@dataclass(frozen=True)
class FeatureSpec:
    """A feature map's size.

    Attributes:
        channels: Channels.
        stride_px: Pixels of the network's input per cell.
    """

    channels: int
    stride_px: int


@dataclass(frozen=True)
class BranchState:
    """A branch between two blocks.

    Attributes:
        grid_BHWC: Its tokens on their grid (B, H, W, C).
        class_token_B1C: Its class token (B, 1, C), ``None`` for a branch without one.
        registers_BRC: Its register tokens (B, R, C), ``None`` for a branch without any.
        rotary: Its rotary positions for each size of windows that its blocks have, 0 for none; see ``ops.rotary``.
            ``None`` for a branch without them.
    """

    grid_BHWC: Tensor
    class_token_B1C: Tensor | None = None
    registers_BRC: Tensor | None = None
    rotary: Mapping[int, Tensor] | None = None

    def with_grid(self, grid_BHWC: Tensor) -> BranchState:
        """The same with another grid (B, H, W, C), on whose device all of it then is."""
        class_token_B1C, registers_BRC, rotary = self.class_token_B1C, self.registers_BRC, self.rotary
        return BranchState(
            grid_BHWC,
            None if class_token_B1C is None else _beside(grid_BHWC, class_token_B1C),
            None if registers_BRC is None else _beside(grid_BHWC, registers_BRC),
            None if rotary is None else {size: _beside(grid_BHWC, table) for size, table in rotary.items()},
        )


def _beside(grid_BHWC: Tensor, tensor: Tensor) -> Tensor:
    return tensor if tensor.device == grid_BHWC.device else tensor.to(grid_BHWC.device)


class Branch(nn.Module, ABC):
    """A backbone that can stop after any block, be changed there, and go on.

    A branch holds no parameters of its own, only modules that do: ``embed`` and ``run`` are plain methods, and ZeRO-3
    gathers parameters at module calls.
    """

    blocks: nn.ModuleList
    """What ``run`` walks through, all of them units; a downsampling layer counts as one."""
    has_layer_decay: bool
    """Whether blocks take layer ids of their own; the released recipes train ConvNeXt at the heads' rate."""

    @abstractmethod
    def embed(self, image_BCHW: Tensor) -> BranchState:
        """The state before the first block.

        Args:
            image_BCHW: Normalised images (B, 3, H, W) at this branch's resolution, any float dtype.

        Raises:
            ModelError: The images are smaller than one token.
        """

    @abstractmethod
    def run(self, state: BranchState, first: int, last: int) -> BranchState:
        """The state after blocks ``first`` to ``last - 1``."""

    @abstractmethod
    def embedding_modules(self) -> list[nn.Module]:
        """The modules below the first block."""


def check_size(image_BCHW: Tensor, smallest_px: int) -> None:
    """Raises a ``ModelError`` where an image has a side shorter than ``smallest_px``."""
    height, width = image_BCHW.shape[-2:]
    if min(height, width) < smallest_px:
        raise ModelError(
            "image too small for a branch",
            value=f"{height}x{width} px at its resolution",
            rule=f"both sides must be at least {smallest_px} px",
        )
