"""The vision transformer branch: every published kind that the presets name, by numbers."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from piip_scale.config.branches import VitBranchConfig
from piip_scale.config.model import AUTO_KERNELS, Kernels
from piip_scale.geometry import block_windows, drop_path_rate
from piip_scale.models.branch import Branch, BranchState, check_size
from piip_scale.models.layers import LINEAR_STD, Conv2d, DropPath, Linear, Mlp, build_layer_scale, build_norm
from piip_scale.models.rotary import RotaryPositions
from piip_scale.models.swiglu import SwiGlu
from piip_scale.models.unit import Unit
from piip_scale.ops.attention import attention, join_heads, split_heads
from piip_scale.ops.qk_norm import qk_rms_norm
from piip_scale.ops.residual import Paths
from piip_scale.ops.resize import resize_position
from piip_scale.ops.rotary import rotate
from piip_scale.ops.windows import gather_windows, join_windows, split_windows


class Vit(Branch):
    """A vision transformer that stops at any block.

    Args:
        config: Its numbers.
        kernels: Names of the kernels.
    """

    has_layer_decay = True

    def __init__(self, config: VitBranchConfig, kernels: Kernels = AUTO_KERNELS) -> None:
        super().__init__()
        self.config = config
        self.embedding = PatchEmbedding(config)
        self.class_token = LearnedTokens(1, config.embed_dim) if config.class_token else None
        self.registers = LearnedTokens(config.register_tokens, config.embed_dim) if config.register_tokens else None
        self.rotary = None if config.rotary is None else RotaryPositions(config, config.rotary)
        self.blocks = nn.ModuleList(Block(config, index, kernels) for index in range(config.depth))

    def embed(self, image_BCHW: Tensor) -> BranchState:
        """See ``Branch.embed``."""
        check_size(image_BCHW, self.config.patch_size_px)
        grid_BHWC: Tensor = self.embedding(image_BCHW)
        return BranchState(
            grid_BHWC,
            self._before_cells(self.class_token, grid_BHWC),
            self._before_cells(self.registers, grid_BHWC),
            None if self.rotary is None else self.rotary(grid_BHWC),
        )

    def run(self, state: BranchState, first: int, last: int) -> BranchState:
        """See ``Branch.run``."""
        height, width = state.grid_BHWC.shape[1:3]
        # The embedding leaves channels apart, and every block of the stage would pass that on: slow rows, and for a
        # compiled block another program.
        tokens_BLC = state.grid_BHWC.flatten(1, 2).contiguous()
        before = [part for part in (state.class_token_B1C, state.registers_BRC) if part is not None]
        if before:
            tokens_BLC = torch.cat((*before, tokens_BLC), 1)
        for block in self.blocks[first:last]:
            turns = () if state.rotary is None else (state.rotary[cast(Block, block).attn.window],)
            tokens_BLC = block(tokens_BLC, height, width, *turns)
        class_token_B1C = None if state.class_token_B1C is None else tokens_BLC[:, :1]
        registers = slice(int(self.config.class_token), self.config.prefix_tokens)
        registers_BRC = None if state.registers_BRC is None else tokens_BLC[:, registers]
        grid_BHWC = tokens_BLC[:, -height * width :].unflatten(1, (height, width))
        return BranchState(grid_BHWC, class_token_B1C, registers_BRC, state.rotary)

    def embedding_modules(self) -> list[nn.Module]:
        """See ``Branch.embedding_modules``."""
        parts = (self.embedding, self.class_token, self.registers, self.rotary)
        return [part for part in parts if part is not None]

    def _before_cells(self, tokens: LearnedTokens | None, grid_BHWC: Tensor) -> Tensor | None:
        """Tokens of every image, normalised as the cells are."""
        if tokens is None:
            return None
        normed: Tensor = self.embedding.norm(tokens(grid_BHWC))
        return normed


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
        dim, patch = config.embed_dim, config.patch_size_px
        self.side = config.pretrain_resolution_px // patch
        self.num_slots = int(config.position_class_slot)
        self.resize = config.position_resize
        self.proj = PatchProjection(3, dim, kernel_size=patch, stride=patch, bias=config.patch_bias)
        positions = torch.empty(1, self.num_slots + self.side**2, dim)
        self.position = nn.Parameter(positions) if config.position_embedding else None
        self.frames = nn.Parameter(torch.empty(config.frame_positions, dim)) if config.frame_positions else None
        self.norm = build_norm(config.norm if config.embedding_norm else "none", dim, config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the positions anew."""
        for positions in (self.position, self.frames):
            if positions is not None:
                nn.init.trunc_normal_(positions, std=LINEAR_STD)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, H // patch, W // patch, C); a remainder of the image is cut off."""
        grid_BHWC: Tensor = self.proj(image_BCHW).permute(0, 2, 3, 1)
        height, width = grid_BHWC.shape[1:3]
        if self.position is not None:
            own_1NC = self.position[:, self.num_slots :]
            grid_BHWC = grid_BHWC + resize_position(own_1NC, self.side, height, width, self.resize)
        if self.frames is not None:
            grid_BHWC = grid_BHWC + self.frames[0]
        output: Tensor = self.norm(grid_BHWC)
        return output


class LearnedTokens(nn.Module):
    """Learned tokens, the same for every image."""

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, num, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the tokens anew."""
        nn.init.trunc_normal_(self.token, std=LINEAR_STD)

    def forward(self, grid_BHWC: Tensor) -> Tensor:
        """(B, num, C) for the grid's batch."""
        return self.token.expand(grid_BHWC.shape[0], -1, -1)


class Block(Unit):
    """Attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, config: VitBranchConfig, index: int, kernels: Kernels) -> None:
        super().__init__(bool(config.checkpoint_blocks))
        dim = config.embed_dim
        self.norm1 = build_norm(config.norm, dim, config.norm_eps)
        self.attn = Attention(config, index, kernels)
        self.ls1 = build_layer_scale(dim, config.layer_scale_init, kernels.fused)
        self.norm2 = build_norm(config.norm, dim, config.norm_eps)
        self.mlp = _build_feed_forward(config, kernels)
        self.ls2 = build_layer_scale(dim, config.layer_scale_init, kernels.fused)
        rate = drop_path_rate(config.sections, index, config.drop_path_rate, config.drop_path_schedule)
        self.drop_path = DropPath(rate, config.drop_path_mode)

    def draw(
        self, tokens_BLC: Tensor, height: int, width: int, rotary_2WLP: Tensor | None = None
    ) -> tuple[Paths | None, ...]:
        """See ``Unit.draw``: one for each residual."""
        return self.drop_path.draw(tokens_BLC), self.drop_path.draw(tokens_BLC)

    def compute(
        self,
        drawn: tuple[Paths | None, ...],
        tokens_BLC: Tensor,
        height: int,
        width: int,
        rotary_2WLP: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, prefix + height * width, C), rows first, to the same shape; positions as ``models.rotary``."""

        def attend(x_BLC: Tensor) -> Tensor:
            found_BLC: Tensor = self.attn(self.norm1(x_BLC), height, width, rotary_2WLP)
            return found_BLC

        tokens_BLC = self.drop_path(tokens_BLC, attend, self.ls1, drawn[0])
        output: Tensor = self.drop_path(tokens_BLC, lambda x_BLC: self.mlp(self.norm2(x_BLC)), self.ls2, drawn[1])
        return output


def _build_feed_forward(config: VitBranchConfig, kernels: Kernels) -> nn.Module:
    if config.feed_forward == "swiglu":
        norm = config.norm if config.mlp_norm else "none"
        return SwiGlu(config.embed_dim, config.hidden_dim, config.mlp_bias, norm, config.norm_eps)
    return Mlp(config.embed_dim, config.hidden_dim, config.activation, kernels.fused, config.mlp_bias)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, or inside windows.

    Tokens before the cells are in no window: each window sees them beside its own cells, and they see themselves and
    all cells of the image.
    """

    def __init__(self, config: VitBranchConfig, index: int, kernels: Kernels) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.window = block_windows(config.window_size_tokens, config.depth)[index]
        self.kernel, self.fused_kernel = kernels.attention, kernels.fused
        self.qkv = Linear(dim, 3 * dim, bias=config.qkv_bias and config.key_bias)
        self.qv_bias = QueryValueBias(dim) if config.qkv_bias and not config.key_bias else nn.Identity()
        self.num_prefix = config.prefix_tokens
        self.halves = config.rotary is not None and config.rotary.pairs == "halves"
        # Over the whole width, all heads together, before heads are split: InternViT's way.
        self.norms_heads = config.qk_norm == "head"
        normed = dim // config.num_heads if self.norms_heads else dim
        self.q_norm = build_norm(config.norm if config.qk_norm else "none", normed, config.norm_eps)
        self.k_norm = build_norm(config.norm if config.qk_norm else "none", normed, config.norm_eps)
        self.position_bias = PositionBias(self.window, self.num_heads) if config.relative_position_bias else None
        self.proj = Linear(dim, dim, bias=config.proj_bias)

    def forward(self, tokens_BLC: Tensor, height: int, width: int, rotary_2WLP: Tensor | None = None) -> Tensor:
        """Tokens (B, prefix + height * width, C), rows first, to the same shape; positions as ``models.rotary``."""
        if not self.window:
            found_BLC = self._attend(*self._heads(tokens_BLC, rotary_2WLP))
        elif not self.num_prefix:
            # Padding comes before qkv: padded tokens take part, with the projection's bias as key and value.
            windows_NLC = split_windows(tokens_BLC.unflatten(1, (height, width)), self.window)
            found_NLC = self._attend(*self._heads(windows_NLC, rotary_2WLP))
            found_BLC = join_windows(found_NLC, self.window, height, width).flatten(1, 2)
        else:
            found_BLC = self._attend_in_windows(tokens_BLC, height, width, rotary_2WLP)
        output: Tensor = self.proj(found_BLC)
        return output

    def _attend_in_windows(self, tokens_BLC: Tensor, height: int, width: int, rotary_2WLP: Tensor | None) -> Tensor:
        prefix_BPC, cells_BLC = tokens_BLC.tensor_split((self.num_prefix,), 1)
        windows_NLC = split_windows(cells_BLC.unflatten(1, (height, width)), self.window)
        query, key, value = self._heads(windows_NLC, rotary_2WLP)
        own_query, own_key, own_value = self._heads(prefix_BPC, None)

        def with_prefix(own_BHPD: Tensor, cells_NHLD: Tensor) -> Tensor:
            repeated = own_BHPD.repeat_interleave(cells_NHLD.shape[0] // own_BHPD.shape[0], 0)
            return torch.cat((repeated, cells_NHLD), 2)

        def of_image(own_BHPD: Tensor, cells_NHLD: Tensor) -> Tensor:
            cells_BLC = gather_windows(join_heads(cells_NHLD), self.window, height, width)
            return split_heads(torch.cat((join_heads(own_BHPD), cells_BLC), 1), self.num_heads)

        seen_NLC = self._attend(query, with_prefix(own_key, key), with_prefix(own_value, value))
        prefix_BPC = self._attend(own_query, of_image(own_key, key), of_image(own_value, value))
        return torch.cat((prefix_BPC, join_windows(seen_NLC, self.window, height, width).flatten(1, 2)), 1)

    def _attend(self, query_BHLD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor) -> Tensor:
        bias_HLL = None if self.position_bias is None else self.position_bias()
        return join_heads(attention(query_BHLD, key_BHSD, value_BHSD, bias_HLL, self.kernel))

    def _heads(self, tokens_BLC: Tensor, rotary_2WLP: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of each head, (B, heads, L, D) each."""
        query, key, value = (split_heads(part, self.num_heads) for part in self._parts(tokens_BLC))
        if self.norms_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary_2WLP is not None:
            query, key = (rotate(part, rotary_2WLP, self.halves) for part in (query, key))
        return query, key, value

    def _parts(self, tokens_BLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, (B, L, C) each; normalised where the whole width is."""
        qkv_BLC = self.qv_bias(self.qkv(tokens_BLC))
        if self.norms_heads:
            query, key, value = qkv_BLC.chunk(3, dim=-1)
            return query, key, value
        if isinstance(self.q_norm, nn.RMSNorm) and isinstance(self.k_norm, nn.RMSNorm):
            return qk_rms_norm(qkv_BLC, self.q_norm, self.k_norm, self.fused_kernel)
        query, key, value = qkv_BLC.chunk(3, dim=-1)
        return self.q_norm(query), self.k_norm(key), value


class QueryValueBias(nn.Module):
    """A bias for queries and values; one for keys would cancel in the softmax."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(dim))
        self.value = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets both to zero."""
        nn.init.zeros_(self.query)
        nn.init.zeros_(self.value)

    def forward(self, qkv_BLC: Tensor) -> Tensor:
        """Queries, keys and values (B, L, 3 * dim) to the same shape."""
        return qkv_BLC + torch.cat((self.query, torch.zeros_like(self.query), self.value))


class PositionBias(nn.Module):
    """A learned bias on the score of every head for every distance inside a window.

    Source: Bao et al., BEiT, without the distances to a class token.
    """

    def __init__(self, window: int, num_heads: int) -> None:
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets every bias to zero."""
        nn.init.zeros_(self.table)

    def forward(self) -> Tensor:
        """(heads, window ** 2, window ** 2), cells rows first."""
        index_LL = relative_positions(self.window, self.table.device)
        return self.table[index_LL].permute(2, 0, 1)


def relative_positions(window: int, device: torch.device) -> Tensor:
    """Row of a table of (2 * window - 1) ** 2 distances for each pair of a window's cells, int64 (w * w, w * w)."""
    cells = torch.arange(window * window, device=device)
    rows, columns = cells // window, cells % window
    down = rows[:, None] - rows + window - 1
    right = columns[:, None] - columns + window - 1
    return down * (2 * window - 1) + right
