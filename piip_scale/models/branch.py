"""What the pyramid network asks of a branch, whatever its architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
    """

    grid_BHWC: Tensor
    class_token_B1C: Tensor | None = None


class Branch(nn.Module, ABC):
    """A backbone that can stop after any block, be changed there, and go on.

    A branch holds no parameters of its own, only modules that do: ``embed`` and ``run`` are plain methods, and ZeRO-3
    gathers parameters at module calls.
    """

    blocks: nn.ModuleList
    """What ``run`` walks through; a downsampling layer counts as one."""

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
    def spec_after(self, block: int) -> FeatureSpec:
        """Width and stride after the given block, 0-based; the stride in pixels of this branch's own input."""

    @abstractmethod
    def embedding_modules(self) -> Iterator[nn.Module]:
        """The modules below the first block."""


def run_block(block: nn.Module, checkpointed: bool, *arguments: Tensor | int) -> Tensor:
    """Calls a block, keeping only its arguments for the backward pass where ``checkpointed``."""
    if checkpointed and block.training:
        # The reentrant kind needs an input with a gradient, which a frozen stem does not give.
        output: Tensor = checkpoint(block, *arguments, use_reentrant=False)
        return output
    output = block(*arguments)
    return output
