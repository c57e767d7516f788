"""Small layers the branches share, each with the start a from-scratch training needs."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from piip_scale.errors import KernelError
from piip_scale.geometry import GROUPS
from piip_scale.ops.double_map import double_map
from piip_scale.ops.gelu import linear_gelu
from piip_scale.ops.group_norm import group_norm
from piip_scale.ops.residual import Paths, add_residual
from piip_scale.ops.stored_linear import store, stored_linear

LINEAR_STD = 0.02
NORM_EPS = 1e-6


class Linear(nn.Linear):
    """A linear layer that starts from a normal distribution cut at two standard deviations, bias at zero.

    Attributes:
        lora: Added to its output, where there is one.
        stored: How the weight is stored, where it is frozen in 8 bits (``ops.stored_linear``).
        weight_scale: Then, of each output channel.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        self.stored: str | None = None
        super().__init__(in_features, out_features, bias)
        self.lora: nn.Module | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is a product of its weight and a bias, and no more."""
        return self.lora is None and self.stored is None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if self.stored is None:
            output = super().forward(x)
        else:
            output = stored_linear(x, self.weight, self.weight_scale, self.bias)
        return output if self.lora is None else output + self.lora(x)

    def store_weight(self, kind: str) -> None:
        """Stores the weight in 8 bits from now on, frozen; on the meta device too.

        Args:
            kind: ``int8`` or ``fp8``.
        """
        self.stored = None
        weight_OC, scale_O = store(self.weight, kind)
        self.stored = kind
        self.weight = nn.Parameter(weight_OC, requires_grad=False)
        self.weight_scale = nn.Parameter(scale_O, requires_grad=False)

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        if not self.weight.is_floating_point():
            self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=torch.float32), requires_grad=False)
        nn.init.trunc_normal_(self.weight, std=LINEAR_STD, a=-2 * LINEAR_STD, b=2 * LINEAR_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.stored is not None:
            self.store_weight(self.stored)


class Conv2d(nn.Conv2d):
    """A convolution that keeps the gradient's variance under ReLU, bias at zero; takes any float dtype in."""

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _normal_by_fan_out(self)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W') in the weights' dtype."""
        return super().forward(map_BCHW.to(self.weight.dtype))


class Doubling(nn.ConvTranspose2d):
    """A transposed convolution of kernel and stride 2 with the start of ``Conv2d``; takes any float dtype in.

    Args:
        dim: Channels in and out.
        dtype_out: Of the result; the weights' where ``None``.
    """

    def __init__(self, dim: int, dtype_out: torch.dtype | None = None) -> None:
        super().__init__(dim, dim, kernel_size=2, stride=2)
        self.dtype_out = dtype_out

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _normal_by_fan_out(self)

    def forward(self, map_BCHW: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W), channels together in memory."""
        return double_map(map_BCHW.to(self.weight.dtype), self.weight, self.bias, self.dtype_out)


class GroupNorm(nn.GroupNorm):
    """A group norm over the released number of groups, with the activation behind it.

    Args:
        dim: Channels.
        activation: ``none``, ``relu`` or ``gelu``.
        kernel: Name of the fused kernel, see ``ops.fused``.
    """

    def __init__(self, dim: int, activation: str = "none", kernel: str = "auto") -> None:
        super().__init__(GROUPS, dim)
        self.activation, self.kernel = activation, kernel

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return group_norm(map_BCHW, self.num_groups, self.weight, self.bias, self.eps, self.activation, self.kernel)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{super().extra_repr()}, activation={self.activation}"


class LayerScale(nn.Module):
    """Adds a residual to its input with a learned scale per channel.

    Args:
        dim: Channels.
        start: The scale's first value.
        kernel: Name of the fused kernel, see ``ops.fused``.
    """

    def __init__(self, dim: int, start: float, kernel: str = "auto") -> None:
        super().__init__()
        self.start, self.kernel = start, kernel
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets every channel to the start value."""
        nn.init.constant_(self.gamma, self.start)

    def forward(self, x: Tensor, residual: Tensor, paths: Paths | None = None) -> Tensor:
        """``x`` (B, ..., dim) plus the residual of the samples that ``paths`` gives one."""
        return add_residual(x, residual, self.gamma, paths, self.kernel)


class Unscaled(nn.Module):
    """Adds a residual to its input as it is: the place of a ``LayerScale`` in a network without."""

    def __init__(self, kernel: str = "auto") -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor, residual: Tensor, paths: Paths | None = None) -> Tensor:
        """``x`` (B, ...) plus the residual of the samples that ``paths`` gives one."""
        return add_residual(x, residual, None, paths, self.kernel)


class GeluLinear(Linear):
    """A linear layer with GELU behind it.

    Args:
        dim_in: Channels in.
        dim_out: Channels out.
        activation: ``gelu`` (exact) or ``gelu_tanh``.
        kernel: Name of the fused kernel for the exact one with a bias, see ``ops.fused``.
        bias: Whether it has a bias.
    """

    def __init__(
        self, dim_in: int, dim_out: int, activation: str = "gelu", kernel: str = "auto", bias: bool = True
    ) -> None:
        super().__init__(dim_in, dim_out, bias=bias)
        self.activation, self.kernel = activation, kernel

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) to (..., dim_out)."""
        if self.activation == "gelu" and self.is_plain and self.bias is not None:
            return linear_gelu(x, self.weight, self.bias, self.kernel)
        return functional.gelu(super().forward(x), approximate="none" if self.activation == "gelu" else "tanh")

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{super().extra_repr()}, activation={self.activation}"


class Mlp(nn.Module):
    """Two linear layers around an activation.

    Args:
        dim: Channels in and out.
        hidden_dim: Channels between.
        activation: ``gelu`` (exact) or ``gelu_tanh``.
        kernel: Name of the fused kernel, see ``ops.fused``.
        bias: Whether both layers have biases.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: str, kernel: str = "auto", bias: bool = True) -> None:
        super().__init__()
        self.fc1 = GeluLinear(dim, hidden_dim, activation, kernel, bias)
        self.fc2 = Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to the same shape."""
        output: Tensor = self.fc2(self.fc1(x))
        return output


class DropPath(nn.Module):
    """Adds a residual with stochastic depth: in training a share of the samples goes without it, the others get more.

    What is drawn comes from ``draw`` and goes into ``forward``, so that this can be computed again, or be compiled.

    Args:
        rate: Share of samples that go without.
        mode: ``zero`` draws for each sample and multiplies by 0; ``skip`` draws a fixed number of samples and computes
            the residual of the others only, in both forward and backward.

    Source: Huang et al., Deep Networks with Stochastic Depth; ``skip`` as in Oquab et al., DINOv2.
    """

    def __init__(self, rate: float, mode: str = "zero") -> None:
        super().__init__()
        self.rate, self.mode = rate, mode

    def draw(self, x: Tensor) -> Paths | None:
        """What ``forward`` of an ``x`` (B, ...) needs; ``None`` where nothing is dropped."""
        if not self.training or self.rate == 0:
            return None
        batch = x.shape[0]
        if self.mode == "skip":
            num_kept = round(batch * computed_share(self.rate, self.mode, batch))
            return Paths(num_kept / batch, index_K=torch.randperm(batch, device=x.device)[:num_kept])
        return Paths(1 - self.rate, mask_B=x.new_empty(batch).bernoulli_(1 - self.rate))

    def forward(
        self,
        x: Tensor,
        residual: Callable[[Tensor], Tensor],
        scale: Callable[..., Tensor],
        paths: Paths | None,
    ) -> Tensor:
        """``x`` (B, ...) plus ``residual(x)`` by its ``scale``.

        Args:
            x: The input.
            residual: What is added; keeps shapes and treats samples independently.
            scale: A ``LayerScale`` or ``Unscaled``.
            paths: From ``draw(x)``.
        """
        if paths is None or paths.index_K is None:
            return scale(x, residual(x), paths)
        return scale(x, residual(x[paths.index_K]), paths)

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


def build_layer_scale(dim: int, start: float | None, kernel: str = "auto") -> nn.Module:
    """A ``LayerScale``, or ``Unscaled`` where ``start`` is None."""
    return Unscaled(kernel) if start is None else LayerScale(dim, start, kernel)


def _normal_by_fan_out(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    # Without memory there is nothing to draw, and torch's own way to find that out was a fifth of building a network.
    if conv.weight.is_meta:
        return
    fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
