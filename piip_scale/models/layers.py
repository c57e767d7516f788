"""Small layers the branches share, each with the start a from-scratch training needs."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from piip_scale.errors import KernelError

LINEAR_STD = 0.02
NORM_EPS = 1e-6


class Linear(nn.Linear):
    """A linear layer that starts from a normal distribution cut at two standard deviations, bias at zero."""

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        nn.init.trunc_normal_(self.weight, std=LINEAR_STD, a=-2 * LINEAR_STD, b=2 * LINEAR_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Conv2d(nn.Conv2d):
    """A convolution that keeps the gradient's variance under ReLU, bias at zero; takes any float dtype in."""

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _normal_by_fan_out(self)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W') in the weights' dtype."""
        return super().forward(map_BCHW.to(self.weight.dtype))


class ConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution with the start of ``Conv2d``; takes any float dtype in."""

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _normal_by_fan_out(self)

    def forward(self, map_BCHW: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W') in the weights' dtype."""
        return super().forward(map_BCHW.to(self.weight.dtype), output_size)


class LayerScale(nn.Module):
    """A learned scale per channel."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets every channel to the start value."""
        nn.init.constant_(self.gamma, self.start)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to the same shape."""
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, dim: int, hidden_dim: int, activation: str) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = build_activation(activation)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to the same shape."""
        output: Tensor = self.fc2(self.act(self.fc1(x)))
        return output


class DropPath(nn.Module):
    """Adds a residual with stochastic depth: in training a share of the samples goes without it, the others get more.

    Args:
        rate: Share of samples that go without.
        mode: ``zero`` draws for each sample and multiplies by 0; ``skip`` draws a fixed number of samples and computes
            the residual of the others only, in both forward and backward.

    Source: Huang et al., Deep Networks with Stochastic Depth; ``skip`` as in Oquab et al., DINOv2.
    """

    def __init__(self, rate: float, mode: str = "zero") -> None:
        super().__init__()
        self.rate, self.mode = rate, mode

    def forward(self, x: Tensor, residual: Callable[[Tensor], Tensor]) -> Tensor:
        """``x`` (B, ...) plus ``residual(x)``; ``residual`` keeps shapes and treats samples independently."""
        if not self.training or self.rate == 0:
            return x + residual(x)
        batch = x.shape[0]
        if self.mode == "skip":
            num_kept = round(batch * computed_share(self.rate, self.mode, batch))
            kept = torch.randperm(batch, device=x.device)[:num_kept]
            return x.index_add(0, kept, residual(x[kept]), alpha=batch / num_kept)
        kept = x.new_empty((batch,) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x + residual(x) * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"rate={self.rate:g}, mode={self.mode}"


def computed_share(rate: float, mode: str, batch_size: int) -> float:
    """The share of a training's micro-batch whose residual is computed."""
    if mode != "skip":
        return 1.0
    return max(1, round(batch_size * (1 - rate))) / batch_size


def build_norm(kind: str, dim: int, eps: float = NORM_EPS) -> nn.Module:
    """A norm over the last axis by its config name: ``layernorm``, ``rmsnorm``, ``apex_rmsnorm`` or ``none``.

    Raises:
        KernelError: ``apex_rmsnorm`` without NVIDIA's apex.
    """
    builders: dict[str, Callable[[], nn.Module]] = {
        "layernorm": lambda: nn.LayerNorm(dim, eps=eps),
        "rmsnorm": lambda: nn.RMSNorm(dim, eps=eps),
        "apex_rmsnorm": lambda: _apex_rmsnorm()(dim, eps=eps),
        "none": nn.Identity,
    }
    return builders[kind]()


def _apex_rmsnorm() -> Callable[..., nn.Module]:
    try:
        found = getattr(importlib.import_module("apex.normalization"), "FusedRMSNorm", None)
    except ImportError:
        found = None
    if found is None:
        # The registry's package of that name is another one.
        raise KernelError(
            "norm apex_rmsnorm needs NVIDIA's apex, which is not installed",
            fix="build it from NVIDIA's repository, or set norm to rmsnorm: the weights are the same",
        )
    return found  # type: ignore[no-any-return]


def build_activation(kind: str) -> nn.Module:
    """GELU by its config name: ``gelu`` (exact) or ``gelu_tanh``."""
    return nn.GELU(approximate={"gelu": "none", "gelu_tanh": "tanh"}[kind])


def build_layer_scale(dim: int, start: float | None) -> nn.Module:
    """A ``LayerScale``, or nothing where ``start`` is None."""
    return nn.Identity() if start is None else LayerScale(dim, start)


def _normal_by_fan_out(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
