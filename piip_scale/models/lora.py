"""Low-rank additions to the linear layers of a frozen branch.

Source: Hu et al., LoRA. The scale is alpha / rank; ``down`` starts as torch's linear layers do, ``up`` at zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from piip_scale.config.branches import LoraConfig, VitBranchConfig
from piip_scale.geometry import num_frozen_blocks
from piip_scale.models.branch import Branch
from piip_scale.models.layers import Linear

LORA = ".lora."
"""In the name of every parameter of one, after its layer's."""


class Lora(nn.Module):
    """What is added to a linear layer's output.

    Args:
        dim_in: Channels in.
        dim_out: Channels out.
        config: Rank and scale.
    """

    def __init__(self, dim_in: int, dim_out: int, config: LoraConfig) -> None:
        super().__init__()
        self.scale = config.scale
        self.down = nn.Parameter(torch.empty(config.rank, dim_in))
        self.up = nn.Parameter(torch.empty(dim_out, config.rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws ``down`` anew and sets ``up`` to zero."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) to (..., dim_out)."""
        return functional.linear(functional.linear(x, self.down) * self.scale, self.up)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"rank={self.down.shape[0]}, scale={self.scale:g}"


def add_lora(branch: Branch, config: VitBranchConfig) -> None:
    """Freezes a branch and adds to the layers that its ``lora`` names, in the blocks above ``frozen_blocks``."""
    if config.lora is None:
        return
    branch.requires_grad_(False)
    for block in list(branch.blocks)[num_frozen_blocks(config.sections, config.frozen_blocks) :]:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, Linear) and target_of(name) in config.lora.targets:
                layer.lora = Lora(layer.in_features, layer.out_features, config.lora)


def target_of(name: str) -> str:
    """What ``lora.targets`` calls a layer of a block: an attention's by its own name, all others by their module's."""
    module, _, own = name.rpartition(".")
    return own if module == "attn" else module
