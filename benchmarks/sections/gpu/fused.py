"""What is fused around matrix products and attention, at the shapes that PIIP-H6B meets with one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from piip_scale.geometry import GROUPS
from piip_scale.ops.deform_attention import grid_deform_attention
from piip_scale.ops.double_map import double_map
from piip_scale.ops.gelu import linear_gelu
from piip_scale.ops.group_norm import group_norm
from piip_scale.ops.merge_map import add_resized
from piip_scale.ops.qk_norm import qk_rms_norm
from piip_scale.ops.residual import Paths, add_residual
from sections.gpu.jobs import Setting

Shape = tuple[int, ...]
_TOY_WIDTHS = {9600: 192, 3200: 64, 1280: 64}
_TOY_SHARE = 16


@dataclass(frozen=True)
class FusedCase:
    """One fused operation.

    Attributes:
        name: What and whose.
        shapes: Of its tensors, maps as (B, H, W, C).
        call: Computes it from these tensors by a kernel's name.
    """

    name: str
    shapes: tuple[Shape, ...]
    call: Callable[[Sequence[Tensor], str], Tensor]

    def tensors(self, setting: Setting, dtype: torch.dtype) -> list[Tensor]:
        """Its tensors with gradients."""
        generator = torch.Generator(setting.device).manual_seed(len(self.name))
        kind = {"device": setting.device, "generator": generator}
        shapes = [tuple(setting.size(side, _toy(side)) for side in shape) for shape in self.shapes]
        drawn = [torch.randn(shape, **kind) for shape in shapes]  # type: ignore[call-overload]
        return [tensor.to(dtype).requires_grad_() for tensor in drawn]

    def kernels(self, setting: Setting) -> tuple[str, ...]:
        """Those that this device has."""
        return ("triton", "plain") if setting.device.type == "cuda" else ("plain",)

    def traffic_bytes(self, setting: Setting, dtype: torch.dtype) -> tuple[int, int]:
        """What the forward and the backward pass move at least: each tensor and gradient once."""
        tensors = self.tensors(setting, dtype)
        output = self.call(tensors, "plain").nbytes
        inputs = sum(tensor.nbytes for tensor in tensors)
        return inputs + output, 2 * inputs + output


def _toy(side: int) -> int:
    return _TOY_WIDTHS.get(side) or max(side // _TOY_SHARE, min(side, 2))


def _deform_shapes(side: int, query_side: int, channels: int) -> tuple[Shape, ...]:
    """Values, offsets and scores of 16 heads and 4 points."""
    queries = (1, query_side, query_side, 16, 4)
    return (1, side, side, 16, channels), (*queries, 2), queries


def _residual(tensors: Sequence[Tensor], kernel: str) -> Tensor:
    x, residual, gamma = tensors
    return add_residual(x, residual, gamma, Paths(0.6, mask_B=x.new_ones(x.shape[0])), kernel)


def _norm(activation: str) -> Callable[[Sequence[Tensor], str], Tensor]:
    def call(tensors: Sequence[Tensor], kernel: str) -> Tensor:
        map_BHWC, gamma, beta = tensors
        return group_norm(map_BHWC.permute(0, 3, 1, 2), GROUPS, gamma, beta, 1e-5, activation, kernel)

    return call


def _merge(tensors: Sequence[Tensor], kernel: str) -> Tensor:
    """Both branches' maps on the grid of the second."""
    large, small, weight = tensors
    height, width = small.shape[1:3]
    total = add_resized(None, large.permute(0, 3, 1, 2), weight, height, width, kernel)
    return add_resized(total, small.permute(0, 3, 1, 2), weight, height, width, kernel)


def _double(tensors: Sequence[Tensor], kernel: str) -> Tensor:
    """``triton`` stands for the product here, ``plain`` for torch's transposed convolution."""
    map_BHWC, weight = tensors
    map_BCHW = map_BHWC.permute(0, 3, 1, 2)
    return (
        double_map(map_BCHW, weight) if kernel == "triton" else functional.conv_transpose2d(map_BCHW, weight, stride=2)
    )


def _gelu(tensors: Sequence[Tensor], kernel: str) -> Tensor:
    """Behind a product of few channels, which takes next to no time."""
    return linear_gelu(tensors[0], tensors[1], tensors[2], kernel)


def _qk(tensors: Sequence[Tensor], kernel: str) -> Tensor:
    qkv, *gammas = tensors
    norms = [nn.RMSNorm(gamma.shape[0], eps=1e-6, device="meta") for gamma in gammas]
    for norm, gamma in zip(norms, gammas, strict=True):
        # A parameter would be a leaf of its own.
        del norm.weight
        norm.weight = gamma  # type: ignore[assignment]
    query, key, value = qk_rms_norm(qkv, norms[0], norms[1], kernel)
    return torch.stack((query, key, value))


def _deform(tensors: Sequence[Tensor], kernel: str) -> Tensor:
    value, offsets, scores = tensors
    return grid_deform_attention(value, offsets, scores, "triton" if kernel == "triton" else "reference")


FUSED = (
    FusedCase("residual, InternViT-6B", ((1, 1024, 3200), (1, 1024, 3200), (3200,)), _residual),
    FusedCase("residual, ViT-H", ((1, 4096, 1280), (1, 4096, 1280), (1280,)), _residual),
    FusedCase("norms of queries and keys, InternViT-6B", ((1, 1025, 9600), (3200,), (3200,)), _qk),
    FusedCase("GELU, InternViT-6B", ((1, 1024, 128), (12800, 128), (12800,)), _gelu),
    FusedCase("GELU, ViT-H", ((1, 4096, 128), (5120, 128), (5120,)), _gelu),
    FusedCase("deformable on a grid, into the large branch", _deform_shapes(64, 32, 100), _deform),
    FusedCase("deformable on a grid, into the small branch", _deform_shapes(32, 64, 40), _deform),
    FusedCase("group norm and ReLU, merging", ((1, 64, 64, 3200), (3200,), (3200,)), _norm("relu")),
    FusedCase("group norm and GELU, pyramid", ((1, 128, 128, 3200), (3200,), (3200,)), _norm("gelu")),
    FusedCase("resize, weight and sum", ((1, 32, 32, 3200), (1, 64, 64, 3200), (1,)), _merge),
    FusedCase("doubling as a product", ((1, 64, 64, 3200), (3200, 3200, 2, 2)), _double),
)
