"""What is fused around matrix products, at the shapes that PIIP-H6B meets with one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from piip_scale.geometry import GROUPS
from piip_scale.ops.double_map import double_map
from piip_scale.ops.group_norm import group_norm
from piip_scale.ops.merge_map import add_resized
from piip_scale.ops.residual import Paths, add_residual
from sections.gpu.jobs import Setting

Shape = tuple[int, ...]
_WIDTHS = (3200, 1280)
_TOY_WIDTH, _TOY_SHARE = 64, 16


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
    return _TOY_WIDTH if side in _WIDTHS else max(side // _TOY_SHARE, min(side, 2))


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


FUSED = (
    FusedCase("residual, InternViT-6B", ((1, 1024, 3200), (1, 1024, 3200), (3200,)), _residual),
    FusedCase("residual, ViT-H", ((1, 4096, 1280), (1, 4096, 1280), (1280,)), _residual),
    FusedCase("group norm and ReLU, merging", ((1, 64, 64, 3200), (3200,), (3200,)), _norm("relu")),
    FusedCase("group norm and GELU, pyramid", ((1, 128, 128, 3200), (3200,), (3200,)), _norm("gelu")),
    FusedCase("resize, weight and sum", ((1, 32, 32, 3200), (1, 64, 64, 3200), (1,)), _merge),
    FusedCase("doubling as a product", ((1, 64, 64, 3200), (3200, 3200, 2, 2)), _double),
)
