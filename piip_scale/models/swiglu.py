"""The gated feed-forward of newer transformers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from piip_scale.models.layers import Linear, build_norm


class SwiGlu(nn.Module):
    """A linear layer's output times SiLU of another's, and a linear layer back.

    The first two are layers of their own, as released files have them: nothing is copied to load one.

    Args:
        dim: Channels in and out.
        hidden_dim: Channels between.
        bias: Whether the layers have biases.
        norm: Of the hidden tokens, a name of ``build_norm``.
        norm_eps: Its epsilon.

    Source: Shazeer, GLU Variants Improve Transformer; the norm as in Fang et al., EVA-02.
    """

    def __init__(self, dim: int, hidden_dim: int, bias: bool, norm: str, norm_eps: float) -> None:
        super().__init__()
        self.gate = Linear(dim, hidden_dim, bias=bias)
        self.value = Linear(dim, hidden_dim, bias=bias)
        self.norm = build_norm(norm, hidden_dim, norm_eps)
        self.fc2 = Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to the same shape."""
        output: Tensor = self.fc2(self.norm(functional.silu(self.gate(x)) * self.value(x)))
        return output
