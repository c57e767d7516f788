"""The pyramid network as an image classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from piip_scale.config.model import ClassifierConfig, PiipConfig
from piip_scale.models.layers import NORM_EPS, Linear, build_norm
from piip_scale.models.merging import Merging
from piip_scale.models.trunk import Trunk
from piip_scale.ops.resize import at_least_float32


class PiipClassifier(Trunk):
    """A trunk with a head for each branch, or one over the merged features; heads compute in at least float32.

    Args:
        config: The trunk; its pyramid is not built.
        head: The head.

    Raises:
        KernelError: A kernel that the config names is not installed.
    """

    def __init__(self, config: PiipConfig, head: ClassifierConfig) -> None:
        super().__init__(config)
        self.head_config = head
        dims = [spec.channels for spec in self.specs_after(config.interaction.num_stages - 1)]
        self.head: nn.Module = (
            SeparateHeads(dims, head.num_classes)
            if head.separate
            else PooledHead(dims, head.num_classes, config.fused_kernel)
        )

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits of a batch of images.

        Args:
            image_BCHW: Normalised images (B, 3, H, W) at the last branch's resolution.

        Returns:
            float32 (B, classes).

        Raises:
            ModelError: The images are too small for a branch.
        """
        return self.logits(image_BCHW)

    def call_order(self) -> list[list[nn.Module]]:
        """See ``Trunk.call_order``."""
        return [*super().call_order(), [self.head]]

    def logits(self, image_BCHW: Tensor) -> Tensor:
        """What ``forward`` returns, also where a subclass is called in another way."""
        *_, states = self.walk(image_BCHW)
        logits_BK: Tensor = self.head(*(state.grid_BHWC for state in states))
        return logits_BK.float()


class SeparateHeads(nn.Module):
    """A norm and a linear layer for every branch, logits averaged."""

    def __init__(self, dims: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(TokenHead(dim, num_classes) for dim in dims)

    def forward(self, *grids_BHWC: Tensor) -> Tensor:
        """One grid (B, H_i, W_i, C_i) a branch to (B, classes)."""
        logits = [_in_float32(part, grid) for part, grid in zip(self.parts, grids_BHWC, strict=True)]
        return torch.stack(logits).mean(0)


class TokenHead(nn.Module):
    """A norm and a linear layer over one token of a branch."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = build_norm("layernorm", dim)
        self.linear = Linear(dim, num_classes)

    def forward(self, grid_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) to (B, classes)."""
        # The released code means to read the class token here, but has split it off: it reads the token at index 0
        # of what is left, the top left patch, and its checkpoints are trained that way.
        logits_BK: Tensor = self.linear(self.norm(grid_BHWC[:, 0, 0]))
        return logits_BK


class PooledHead(nn.Module):
    """One norm and linear layer over the mean of the merged features."""

    def __init__(self, dims: Sequence[int], num_classes: int, kernel: str) -> None:
        super().__init__()
        self.merging = Merging(dims, "pooled", kernel)
        self.norm = PooledNorm(dims[0])
        self.linear = Linear(dims[0], num_classes)

    def forward(self, *grids_BHWC: Tensor) -> Tensor:
        """One grid (B, H_i, W_i, C_i) a branch to (B, classes)."""
        pooled_BC = _in_float32(self.norm, _in_float32(self.merging, *grids_BHWC))
        return _in_float32(self.linear, pooled_BC)


class PooledNorm(nn.LayerNorm):
    """A layer norm of every cell, then the mean over the grid, in the norm's dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=NORM_EPS)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C)."""
        return super().forward(map_BCHW.permute(0, 2, 3, 1).to(self.weight.dtype)).mean((1, 2))


def _in_float32(module: nn.Module, *inputs: Tensor) -> Tensor:
    """A module's output, computed in float32 (float64 stays) whatever its weights are kept in.

    Under ZeRO one engine holds one dtype; the casts have gradients.
    """
    weights = {name: at_least_float32(parameter) for name, parameter in module.named_parameters()}
    with torch.autocast(inputs[0].device.type, enabled=False):
        output: Tensor = torch.func.functional_call(module, weights, tuple(map(at_least_float32, inputs)))
    return output
