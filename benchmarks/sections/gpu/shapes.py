"""The shapes that the published networks really meet, for one image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from piip_scale.ops.attention import FlashFunction, attention, call_flash, find_flash_functions
from sections.gpu.jobs import Setting

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class AttentionShape:
    """One attention of a branch.

    Attributes:
        name: Whose it is.
        batch: Sequences an image: windows, or one.
        heads: Heads.
        tokens: Tokens of a sequence.
        size: Channels of a head.
        has_bias: Whether a position bias is added to the scores.
    """

    name: str
    batch: int
    heads: int
    tokens: int
    size: int
    has_bias: bool = False

    def tensors(
        self, setting: Setting, dtype: torch.dtype, extra_tokens: int = 0
    ) -> tuple[list[Tensor], Tensor | None]:
        """Queries, keys and values (B, heads, L, D) with gradients, and the bias (heads, L, L) or none."""
        tokens = setting.size(self.tokens + extra_tokens, 8)
        batch, heads = setting.size(self.batch, 1), setting.size(self.heads, 2)
        generator = torch.Generator(setting.device).manual_seed(tokens)
        kind = {"device": setting.device, "dtype": dtype, "generator": generator}
        shape = (batch, heads, tokens, self.size)
        parts = [torch.randn(shape, **kind).requires_grad_() for _ in range(3)]  # type: ignore[call-overload]
        bias = torch.randn(heads, tokens, tokens, **kind) if self.has_bias else None  # type: ignore[call-overload]
        return parts, bias

    @property
    def forward_flops(self) -> int:
        """Of both products."""
        return 4 * self.batch * self.heads * self.tokens**2 * self.size


ATTENTION = (
    AttentionShape("InternViT-6B, 512 px", 1, 25, 1025, 128),
    AttentionShape("ViT-H, 1024 px", 1, 16, 4096, 80),
    AttentionShape("ViT-H, windows", 25, 16, 196, 80),
    AttentionShape("ViT-S, 1568 px", 1, 6, 9604, 64),
    AttentionShape("BEiT, windows with bias", 9, 16, 256, 64, has_bias=True),
)


@dataclass(frozen=True)
class DeformShape:
    """One deformable attention of an interaction unit.

    Attributes:
        name: Whose it is.
        side: Cells of a side of the map that is read.
        queries: Queries.
        heads: Heads.
        channels: Channels of a head.
    """

    name: str
    side: int
    queries: int
    heads: int
    channels: int
    points: int = 4

    def tensors(self, setting: Setting, dtype: torch.dtype) -> list[Tensor]:
        """Values (1, H, W, heads, D), locations (1, L, heads, points, 2) and weights, with gradients."""
        side, queries = setting.size(self.side, 6), setting.size(self.queries, 20)
        generator = torch.Generator(setting.device).manual_seed(self.channels)
        kind = {"device": setting.device, "generator": generator}
        value = torch.randn(1, side, side, self.heads, self.channels, **kind).to(dtype)  # type: ignore[call-overload]
        looks = torch.rand(1, queries, self.heads, self.points, 2, **kind) * 1.2 - 0.1  # type: ignore[call-overload]
        scores = torch.randn(1, queries, self.heads, self.points, **kind)  # type: ignore[call-overload]
        return [value.requires_grad_(), looks.requires_grad_(), scores.softmax(-1).requires_grad_()]

    def traffic_bytes(self, element_bytes: int) -> int:
        """What the forward pass reads of the map, four corners a point, and writes."""
        return self.queries * self.heads * self.channels * (4 * self.points + 1) * element_bytes


DEFORM = (
    DeformShape("H6B, into the large branch", 64, 1024, 16, 100),
    DeformShape("H6B, into the small branch", 32, 4096, 16, 40),
    DeformShape("SBL, heads of 24", 70, 9604, 16, 24),
    DeformShape("heads of 64", 64, 4096, 16, 64),
)


def attention_backends(setting: Setting) -> dict[str, Attend]:
    """Every way to attend that could serve here, by name; which of them refuse a shape, the row says."""
    kernels: dict[str, Attend] = {name: _ours(name) for name in ("math", "sdpa", "auto")}
    if setting.device.type != "cuda":
        return kernels
    backends = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
    kernels |= {f"sdpa {name.removesuffix('_ATTENTION').lower()}": _torchs(name) for name in backends}
    return kernels | {name: _flash(function) for name, function in find_flash_functions().items()}


def _ours(kernel: str) -> Attend:
    return lambda query, key, value, bias: attention(query, key, value, bias, kernel)


def _torchs(name: str) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    return attend


def _flash(function: FlashFunction) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            raise ValueError("flash attention adds no bias")
        return call_flash(function, query, key, value)

    return attend
