"""A block of a ViT-S that is measured: full attention or windows, with or without rotary positions, with registers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from piip_scale.config.branches import VitBranchConfig
from piip_scale.config.model import PiipConfig
from piip_scale.config.presets import PRESETS
from piip_scale.config.pyramid import PyramidConfig
from piip_scale.engine.rehearsal import rehearse
from piip_scale.geometry import Grid
from piip_scale.models.network_work import AS_COMPUTED, NetworkWork
from piip_scale.models.vit import Vit

_PATCH_PX = 16


@dataclass(frozen=True)
class WindowedBlock:
    """One block of DINOv3 S: 384 channels, six heads, a class token and four registers.

    Attributes:
        grid: Rows and columns of its cells.
        window: Side of a window in cells; 0 for full attention.
        rotary: Whether positions turn queries and keys.
    """

    grid: Grid
    window: int
    rotary: bool

    def __str__(self) -> str:
        attention = f"windows of {self.window}" if self.window else "full attention"
        return f"{self.grid[0]} x {self.grid[1]}, {attention}{', rotary' if self.rotary else ''}"

    def config(self, depth: int = 1) -> VitBranchConfig:
        """The branch of so many such blocks."""
        own = {"depth": depth, "resolution_px": 512, "window_size_tokens": (self.window,) * depth}
        return VitBranchConfig(**PRESETS["dinov3_s"] | own | ({} if self.rotary else {"rotary": None}))

    def macs(self) -> int:
        """Multiply-accumulates of its forward pass on one image, padded cells counted as they are computed."""
        height_px, width_px = (side * _PATCH_PX for side in self.grid)
        pyramid = PyramidConfig(scales=(1.0,))
        configs = [PiipConfig(branches=(self.config(depth),), pyramid=pyramid) for depth in (1, 2)]
        one, two = (NetworkWork(each, height_px, width_px, AS_COMPUTED, None).branch(0).forward for each in configs)
        return two - one

    def kept_bytes(self, dtype: torch.dtype) -> int:
        """What it keeps of one image for the backward pass, its output included, where attention is fused."""
        prepared = PreparedBlock(self, torch.device("meta"), dtype)
        return rehearse(prepared.branch, {"block": prepared.branch.blocks[0]}, lambda: (prepared(),)).total_bytes


class PreparedBlock:
    """A block with random weights, and tokens of one image.

    Args:
        case: Which.
        device: Where.
        dtype: Of weights and tokens.
    """

    def __init__(self, case: WindowedBlock, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.case, config = case, case.config()
        with device:
            self.branch = Vit(config).to(dtype).train()
            shape = (1, config.prefix_tokens + case.grid[0] * case.grid[1], config.embed_dim)
            self.tokens_BLC = torch.randn(shape, dtype=dtype).requires_grad_()
        self.inputs = [self.tokens_BLC, *self.branch.blocks.parameters()]
        self._turns = self.make_turns()

    def make_turns(self) -> tuple[Tensor, ...]:
        """The rotary positions of an image, which all blocks of a branch share; none without."""
        if self.branch.rotary is None:
            return ()
        cells = self.tokens_BLC.new_empty(1, *self.case.grid, 0)
        return tuple(self.branch.rotary(cells).values())

    def __call__(self) -> Tensor:
        """The forward pass."""
        output: Tensor = self.branch.blocks[0](self.tokens_BLC, *self.case.grid, *self._turns)
        return output

    def backward(self, output_BLC: Tensor) -> None:
        """Gradients of the tokens and of all weights, from a cotangent of ones."""
        torch.autograd.grad(output_BLC, self.inputs, torch.ones_like(output_BLC), retain_graph=True)
