"""The units that exchange features between neighbouring branches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from piip_scale.config.interaction import InteractionConfig
from piip_scale.config.model import Kernels
from piip_scale.geometry import scaled_width
from piip_scale.models.layers import Conv2d, DropPath, LayerScale, Linear, build_norm
from piip_scale.models.unit import Unit
from piip_scale.ops.attention import attention, join_heads, split_heads
from piip_scale.ops.deform_attention import grid_deform_attention
from piip_scale.ops.residual import Paths


class InteractionUnit(Unit):
    """Joins a larger model at low resolution and a smaller one at high resolution, both ways at once.

    Args:
        config: The units' numbers.
        large_dim: Width of the larger model.
        small_dim: Width of the smaller model.
        kernels: Names of the kernels.
    """

    def __init__(self, config: InteractionConfig, large_dim: int, small_dim: int, kernels: Kernels) -> None:
        super().__init__(config.checkpoint_units)
        self.project_to_large: nn.Module = Linear(small_dim, large_dim) if config.projection else nn.Identity()
        self.project_to_small: nn.Module = Linear(large_dim, small_dim) if config.projection else nn.Identity()
        projected = config.projection
        self.inject_into_large = Injection(config, large_dim, large_dim if projected else small_dim, kernels)
        self.inject_into_small = Injection(config, small_dim, small_dim if projected else large_dim, kernels)

    def draw(self, large_BHWC: Tensor, small_BHWC: Tensor) -> tuple[Paths | None, ...]:
        """See ``Unit.draw``: one for each direction."""
        return self.inject_into_large.draw(large_BHWC), self.inject_into_small.draw(small_BHWC)

    def compute(self, drawn: tuple[Paths | None, ...], large_BHWC: Tensor, small_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Both branches' grids to the same shapes; each direction reads the features as they came in."""
        from_small_BHWC = self.project_to_large(small_BHWC)
        from_large_BHWC = self.project_to_small(large_BHWC)
        return (
            self.inject_into_large(large_BHWC, from_small_BHWC, drawn[0]),
            self.inject_into_small(small_BHWC, from_large_BHWC, drawn[1]),
        )


class ToSmallUnit(Unit):
    """The half of an ``InteractionUnit`` that the smaller model receives, by the same names; nothing flows back.

    Args:
        config: The units' numbers.
        large_dim: Width of the larger model.
        small_dim: Width of the smaller model.
        kernels: Names of the kernels.
    """

    def __init__(self, config: InteractionConfig, large_dim: int, small_dim: int, kernels: Kernels) -> None:
        super().__init__(config.checkpoint_units)
        self.project_to_small: nn.Module = Linear(large_dim, small_dim) if config.projection else nn.Identity()
        self.inject_into_small = Injection(config, small_dim, small_dim if config.projection else large_dim, kernels)

    def draw(self, large_BHWC: Tensor, small_BHWC: Tensor) -> tuple[Paths | None, ...]:
        """See ``Unit.draw``."""
        return (self.inject_into_small.draw(small_BHWC),)

    def compute(self, drawn: tuple[Paths | None, ...], large_BHWC: Tensor, small_BHWC: Tensor) -> Tensor:
        """Both branches' grids to the smaller model's, of the same shape."""
        output: Tensor = self.inject_into_small(small_BHWC, self.project_to_small(large_BHWC), drawn[0])
        return output


def build_unit(config: InteractionConfig, large_dim: int, small_dim: int, kernels: Kernels) -> Unit:
    """The unit of a config's direction; arguments as those of ``InteractionUnit``."""
    kind = InteractionUnit if config.direction == "both" else ToSmallUnit
    return kind(config, large_dim, small_dim, kernels)


def exchange(unit: Unit, large_BHWC: Tensor, small_BHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Both branches' grids after their unit; one that receives nothing is passed on as it is."""
    if isinstance(unit, ToSmallUnit):
        return large_BHWC, unit(large_BHWC, small_BHWC)
    found: tuple[Tensor, Tensor] = unit(large_BHWC, small_BHWC)
    return found


class Injection(nn.Module):
    """Adds to a branch what it finds in another's features, then a feed-forward of the sum."""

    def __init__(self, config: InteractionConfig, dim: int, source_dim: int, kernels: Kernels) -> None:
        super().__init__()
        self.query_norm = build_norm(config.norm, dim)
        self.source_norm = build_norm(config.norm, source_dim)
        self.attn: nn.Module
        if config.attention == "deform":
            self.attn = DeformAttention(config, dim, source_dim, kernels.deform)
        else:
            self.attn = CrossAttention(config.num_heads, dim, source_dim, kernels.attention)
        self.attn_scale = LayerScale(dim, config.gamma_init, kernels.fused)
        self.feed_forward = FeedForward(config, dim, kernels) if config.ffn_ratio > 0 else None

    def draw(self, query_BHWC: Tensor) -> Paths | None:
        """What the feed-forward's stochastic depth draws."""
        return None if self.feed_forward is None else self.feed_forward.drop_path.draw(query_BHWC)

    def forward(self, query_BHWC: Tensor, source_BHWC: Tensor, paths: Paths | None) -> Tensor:
        """The branch's grid (B, H, W, C), and the other's (B, H', W', C'), to the first one's shape.

        Args:
            query_BHWC: The branch's.
            source_BHWC: The other's.
            paths: From ``draw(query_BHWC)``.
        """
        found_BHWC = self.attn(self.query_norm(query_BHWC), self.source_norm(source_BHWC))
        output: Tensor = self.attn_scale(query_BHWC, found_BHWC)
        return output if self.feed_forward is None else self.feed_forward(output, paths)


class FeedForward(nn.Module):
    """A feed-forward with a 3x3 depthwise convolution over the grid inside, behind a norm and added to its input."""

    def __init__(self, config: InteractionConfig, dim: int, kernels: Kernels) -> None:
        super().__init__()
        hidden_dim = scaled_width(dim, config.ffn_ratio)
        self.norm = build_norm(config.norm, dim)
        self.fc1 = Linear(dim, hidden_dim)
        self.dwconv = Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dim, dim)
        self.drop_path = DropPath(config.drop_path_rate, config.drop_path_mode)
        self.scale = LayerScale(dim, config.gamma_init, kernels.fused)

    def forward(self, grid_BHWC: Tensor, paths: Paths | None) -> Tensor:
        """(B, H, W, C) to the same shape; ``paths`` is what ``drop_path`` drew for it."""
        output: Tensor = self.drop_path(grid_BHWC, self._residual, self.scale, paths)
        return output

    def _residual(self, grid_BHWC: Tensor) -> Tensor:
        hidden_BCHW = self.fc1(self.norm(grid_BHWC)).permute(0, 3, 1, 2)
        hidden_BHWC = self.dwconv(hidden_BCHW).permute(0, 2, 3, 1)
        residual: Tensor = self.fc2(self.act(hidden_BHWC))
        return residual


class CrossAttention(nn.Module):
    """Attention of every query cell to every source cell."""

    def __init__(self, num_heads: int, dim: int, source_dim: int, kernel: str) -> None:
        super().__init__()
        self.num_heads, self.kernel = num_heads, kernel
        self.query = Linear(dim, dim, bias=False)
        self.key = Linear(source_dim, dim, bias=False)
        self.value = Linear(source_dim, dim, bias=False)
        self.proj = Linear(dim, dim)

    def forward(self, query_BHWC: Tensor, source_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) and (B, H', W', C') to (B, H, W, C)."""
        height, width = query_BHWC.shape[1:3]
        parts = (self.query(query_BHWC), self.key(source_BHWC), self.value(source_BHWC))
        query, key, value = (split_heads(part.flatten(1, 2), self.num_heads) for part in parts)
        found_BLC = join_heads(attention(query, key, value, kernel=self.kernel))
        output: Tensor = self.proj(found_BLC.unflatten(1, (height, width)))
        return output


class DeformAttention(nn.Module):
    """Attention of every query cell to a few places of the source that it chooses itself.

    Source: Zhu et al., Deformable DETR, with one level and a value width of its own.
    """

    def __init__(self, config: InteractionConfig, dim: int, source_dim: int, kernel: str) -> None:
        super().__init__()
        self.num_heads, self.num_points, self.kernel = config.num_heads, config.num_points, kernel
        value_dim = scaled_width(dim, config.value_ratio)
        self.offsets = SamplingOffsets(dim, config.num_heads, config.num_points)
        self.weights = ZeroLinear(dim, config.num_heads * config.num_points)
        self.value = XavierLinear(source_dim, value_dim)
        self.proj = XavierLinear(value_dim, dim)

    def forward(self, query_BHWC: Tensor, source_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) and (B, H', W', C') to (B, H, W, C)."""
        value_BHWMD = self.value(source_BHWC).unflatten(-1, (self.num_heads, -1))
        offsets_BHWMP2 = self.offsets(query_BHWC).unflatten(-1, (self.num_heads, self.num_points, 2))
        scores_BHWMP = self.weights(query_BHWC).unflatten(-1, (self.num_heads, self.num_points))
        found_BHWMD = grid_deform_attention(value_BHWMD, offsets_BHWMP2, scores_BHWMP, self.kernel)
        output: Tensor = self.proj(found_BHWMD.flatten(3))
        return output


class SamplingOffsets(Linear):
    """Where to look, per query, head and point; at the start each head looks in a direction of its own."""

    def __init__(self, dim: int, num_heads: int, num_points: int) -> None:
        self.num_heads, self.num_points = num_heads, num_points
        super().__init__(dim, num_heads * num_points * 2)

    def reset_parameters(self) -> None:
        """Sets point p of head h p + 1 cells away, in the direction of the h-th part of a full turn."""
        # Likewise a fifth of building a network without memory.
        if self.weight.is_meta:
            return
        nn.init.zeros_(self.weight)
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        with torch.no_grad():
            self.bias.copy_((directions[:, None] * steps[:, None]).flatten())


class ZeroLinear(Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        """Sets everything to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class XavierLinear(Linear):
    """A linear layer with Xavier's uniform start."""

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)
