"""Activations inside Triton kernels, by their place in ``ops.group_norm.ACTIVATIONS``."""

# Annotations of a kernel's arguments are instructions to Triton, so most have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

_INV_SQRT_2, _INV_SQRT_2PI = tl.constexpr(0.7071067811865476), tl.constexpr(0.3989422804014327)


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    """``y`` after none, ReLU or exact GELU."""
    if ACTIVATION == 1:
        y = tl.maximum(y, 0.0)
    if ACTIVATION == 2:
        y = 0.5 * y * (1.0 + tl.erf(y * _INV_SQRT_2))
    return y


@triton.jit
def before_activation(grad, y, ACTIVATION: tl.constexpr):
    """The gradient of ``y`` from that of its activation."""
    if ACTIVATION == 1:
        grad = tl.where(y > 0, grad, 0.0)
    if ACTIVATION == 2:
        share = 0.5 * (1.0 + tl.erf(y * _INV_SQRT_2))
        grad = grad * (share + y * tl.exp(-0.5 * y * y) * _INV_SQRT_2PI)
    return grad
