"""The plain vision transformer branch: DeiT, InternViT, MAE, AugReg, DINOv2, BEiT v2 and Uni-Perceiver by numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from piip_scale.config.model import VitBranchConfig
from piip_scale.errors import ModelError
from piip_scale.models.branch import Branch, BranchState, FeatureSpec, run_block
from piip_scale.models.layers import LINEAR_STD, Conv2d, DropPath, Linear, Mlp, build_layer_scale, build_norm
from piip_scale.ops.attention import attention, join_heads, split_heads
from piip_scale.ops.resize import resize_position
from piip_scale.ops.windows import join_windows, split_windows


class Vit(Branch):
    """A vision transformer that stops at any block.

    Args:
        config: Its numbers.
        attention_kernel: Name of the attention kernel, see ``ops.attention``.
    """

    def __init__(self, config: VitBranchConfig, attention_kernel: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.embedding = PatchEmbedding(config)
        self.blocks = nn.ModuleList(Block(config, index, attention_kernel) for index in range(config.depth))

    def embed(self, image_BCHW: Tensor) -> BranchState:
        """See ``Branch.embed``."""
        patch = self.config.patch_size_px
        if min(image_BCHW.shape[-2:]) < patch:
            height, width = image_BCHW.shape[-2:]
            raise ModelError(
                "image too small for a branch",
                value=f"{height}x{width} px at its resolution",
                rule=f"both sides must be at least patch_size_px={patch}",
            )
        return BranchState(self.embedding(image_BCHW))

    def run(self, state: BranchState, first: int, last: int) -> BranchState:
        """See ``Branch.run``."""
        height, width = state.grid_BHWC.shape[1:3]
        tokens_BLC = state.grid_BHWC.flatten(1, 2)
        for block in self.blocks[first:last]:
            tokens_BLC = run_block(block, self.config.checkpoint_blocks, tokens_BLC, height, width)
        return BranchState(tokens_BLC.unflatten(1, (height, width)))

    def spec_after(self, block: int) -> FeatureSpec:
        """See ``Branch.spec_after``."""
        return FeatureSpec(self.config.embed_dim, self.config.patch_size_px)

    def embedding_modules(self) -> Iterator[nn.Module]:
        """See ``Branch.embedding_modules``."""
        yield self.embedding


class PatchProjection(Conv2d):
    """The kernel over one patch, which starts with unit gain."""

    def reset_parameters(self) -> None:
        """Draws the kernel anew."""
        nn.init.normal_(self.weight, std=(self.in_channels * math.prod(self.kernel_size)) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class PatchEmbedding(nn.Module):
    """Patches to tokens, plus a learned position for each cell of the grid."""

    def __init__(self, config: VitBranchConfig) -> None:
        super().__init__()
        patch = config.patch_size_px
        self.side = config.pretrain_resolution_px // patch
        self.num_slots = int(config.position_class_slot)
        self.proj = PatchProjection(3, config.embed_dim, kernel_size=patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, self.num_slots + self.side**2, config.embed_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the positions anew."""
        nn.init.trunc_normal_(self.position, std=LINEAR_STD)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, H // patch, W // patch, C); a remainder of the image is cut off."""
        grid_BHWC: Tensor = self.proj(image_BCHW).permute(0, 2, 3, 1)
        height, width = grid_BHWC.shape[1:3]
        return grid_BHWC + resize_position(self.position[:, self.num_slots :], self.side, height, width)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, config: VitBranchConfig, index: int, attention_kernel: str) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = build_norm(config.norm, dim)
        self.attn = Attention(config, index, attention_kernel)
        self.ls1 = build_layer_scale(dim, config.layer_scale_init)
        self.norm2 = build_norm(config.norm, dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), config.activation)
        self.ls2 = build_layer_scale(dim, config.layer_scale_init)
        self.drop_path = DropPath(_drop_path_rate(config, index))

    def forward(self, tokens_BLC: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, height * width, C), rows first, to the same shape."""
        tokens_BLC = tokens_BLC + self.drop_path(self.ls1(self.attn(self.norm1(tokens_BLC), height, width)))
        output: Tensor = tokens_BLC + self.drop_path(self.ls2(self.mlp(self.norm2(tokens_BLC))))
        return output


class Attention(nn.Module):
    """Multi-head self-attention over the whole grid or inside windows."""

    def __init__(self, config: VitBranchConfig, index: int, kernel: str) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.window = config.window_size_tokens[index] if config.window_size_tokens else 0
        self.kernel = kernel
        self.qkv = Linear(dim, 3 * dim, bias=config.qkv_bias)
        # Over the whole width, all heads together, before heads are split: InternViT's way.
        self.q_norm = build_norm("rmsnorm" if config.qk_norm else "none", dim)
        self.k_norm = build_norm("rmsnorm" if config.qk_norm else "none", dim)
        self.proj = Linear(dim, dim)

    def forward(self, tokens_BLC: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, height * width, C), rows first, to the same shape."""
        if not self.window:
            return self._attend(tokens_BLC)
        # Padding comes before qkv: padded tokens take part, with the projection's bias as key and value.
        windows_NLC = split_windows(tokens_BLC.unflatten(1, (height, width)), self.window)
        return join_windows(self._attend(windows_NLC), self.window, height, width).flatten(1, 2)

    def _attend(self, tokens_BLC: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens_BLC).chunk(3, dim=-1)
        query, key, value = (
            split_heads(part, self.num_heads) for part in (self.q_norm(query), self.k_norm(key), value)
        )
        output: Tensor = self.proj(join_heads(attention(query, key, value, kernel=self.kernel)))
        return output


def _drop_path_rate(config: VitBranchConfig, index: int) -> float:
    if config.drop_path_schedule == "constant" or config.depth == 1:
        return config.drop_path_rate
    return config.drop_path_rate * index / (config.depth - 1)
