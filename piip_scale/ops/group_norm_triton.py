"""``ops.group_norm.group_norm`` as Triton kernels over maps whose channels lie together.

Each pass has a tile of rows (cells) and channels, whatever the groups: statistics are summed per channel, and a small
kernel joins the channels of a group. Sums are never of atomics: the same bits from run to run.
"""

# Annotations of a kernel's arguments are instructions to Triton, so most have none.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from piip_scale.ops import fused
from piip_scale.ops.activation_triton import activated, before_activation
from piip_scale.ops.group_norm import ACTIVATIONS

_BLOCK_WIDTH = 256
_BLOCK_ROWS = {"none": 8, "relu": 8, "gelu": 4}
"""A tile of 16 elements a thread, two loads of 16 bytes in half precision; the derivative of GELU takes registers."""
_PART_ROWS = 64
"""Rows of one program of a pass that sums: its sums are 1/64 of what it reads."""
_BLOCK_PARTS = 32
"""Partial sums that the kernel which joins them reads at a time."""


def group_norm_triton(
    map_BHWC: Tensor, num_groups: int, gamma_C: Tensor, beta_C: Tensor, eps: float, activation: str
) -> Tensor:
    """``ops.group_norm.group_norm`` with channels last, on a CUDA device, or anywhere under ``TRITON_INTERPRET=1``."""
    output: Tensor = _GroupNorm.apply(map_BHWC, gamma_C, beta_C, num_groups, eps, ACTIVATIONS.index(activation))
    return output


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, num_groups: int, eps: float, activation: int
    ) -> Tensor:
        x = x.contiguous()
        batch, width = x.shape[0], x.shape[-1]
        rows = x.numel() // batch // width
        constants, parts = layout(width, num_groups, activation), _num_parts(rows)
        sums = x.new_empty(2, batch, parts, width, dtype=torch.float32)
        moments = x.new_empty(2, batch, num_groups, dtype=torch.float32)
        output = torch.empty_like(x)
        blocks = triton.cdiv(width, _BLOCK_WIDTH)
        # Before the activation: its tiles need not be smaller for it.
        summing = _only(layout(width, num_groups, ACTIVATIONS.index("none")), _sum_kernel)
        fused.launch(_sum_kernel, (parts, blocks, batch), x, *sums, rows, **summing)
        joining = _only(constants, _join_kernel)
        fused.launch(_join_kernel, (batch * num_groups,), *sums, *moments, rows, parts, eps, **joining)
        grid = (triton.cdiv(rows, constants["BLOCK_ROWS"]), blocks, batch)
        fused.launch(_apply_kernel, grid, x, gamma, beta, *moments, output, rows, **_only(constants, _apply_kernel))
        ctx.save_for_backward(x, gamma, beta, moments)
        ctx.constants, ctx.num_groups = constants, num_groups
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, moments = ctx.saved_tensors
        grad = grad.contiguous()
        batch, width = x.shape[0], x.shape[-1]
        rows = x.numel() // batch // width
        constants, parts, blocks = ctx.constants, _num_parts(rows), triton.cdiv(width, _BLOCK_WIDTH)
        sums = x.new_empty(2, batch, parts, width, dtype=torch.float32)
        shares = torch.empty_like(moments)
        grad_gamma, grad_beta = torch.empty_like(gamma), torch.empty_like(beta)
        known = (x, grad, gamma, beta, *moments)
        summing = _only(constants, _grad_sum_kernel)
        fused.launch(_grad_sum_kernel, (parts, blocks, batch), *known, *sums, rows, **summing)
        joining = (*sums, gamma, *shares, grad_gamma, grad_beta, rows, parts, batch)
        fused.launch(_grad_join_kernel, (ctx.num_groups,), *joining, **_only(constants, _grad_join_kernel))
        grad_x, grid = torch.empty_like(x), (triton.cdiv(rows, constants["BLOCK_ROWS"]), blocks, batch)
        applying = _only(constants, _grad_apply_kernel)
        fused.launch(_grad_apply_kernel, grid, *known, *shares, grad_x, rows, **applying)
        return grad_x, grad_gamma, grad_beta, None, None, None


def layout(width: int, num_groups: int, activation: int) -> dict[str, int]:
    """What kernels are compiled for: a width known at compile time lets rows be read in wide loads."""
    size, block_rows = width // num_groups, _BLOCK_ROWS[ACTIVATIONS[activation]]
    return {
        "WIDTH": width,
        "GROUPS": num_groups,
        "SIZE": size,
        "BLOCK_SIZE": triton.next_power_of_2(size),
        "BLOCK_ROWS": block_rows,
        "BLOCK_WIDTH": _BLOCK_WIDTH,
        "BLOCK_PARTS": _BLOCK_PARTS,
        "TILES": _PART_ROWS // block_rows,
        "ACTIVATION": activation,
    }


def _num_parts(rows: int) -> int:
    parts: int = triton.cdiv(rows, _PART_ROWS)
    return parts


def _only(constants: dict[str, int], kernel: Any) -> dict[str, int]:
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


@triton.jit
def _tile(num_rows, first, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Offsets of a tile of one sample's rows and channels, and which of them there are."""
    rows = first + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    place = (tl.program_id(2).to(tl.int64) * num_rows + rows.to(tl.int64))[:, None] * WIDTH + columns[None, :]
    return place, (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def _sum_kernel(
    x,
    means,
    squares,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """Of each channel in a part of the rows: the mean, and the squared distances from it."""
    start = tl.program_id(0) * TILES * BLOCK_ROWS
    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    for tile in range(TILES):
        place, keep = _tile(num_rows, start + tile * BLOCK_ROWS, WIDTH, BLOCK_ROWS, BLOCK_WIDTH)
        total += tl.load(x + place, mask=keep, other=0.0).to(tl.float32)
    count = tl.minimum(num_rows - start, TILES * BLOCK_ROWS)
    mean = tl.sum(total, axis=0) / count
    distance = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    # Read again, from the cache: a sum of squares less a squared sum would lose what is far from zero.
    for tile in range(TILES):
        place, keep = _tile(num_rows, start + tile * BLOCK_ROWS, WIDTH, BLOCK_ROWS, BLOCK_WIDTH)
        off = tl.where(keep, tl.load(x + place, mask=keep, other=0.0).to(tl.float32) - mean[None, :], 0.0)
        distance += off * off
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    own = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * WIDTH + columns
    tl.store(means + own, mean, mask=columns < WIDTH)
    tl.store(squares + own, tl.sum(distance, axis=0), mask=columns < WIDTH)


@triton.jit
def _join_kernel(
    means,
    squares,
    mean,
    rstd,
    num_rows,
    num_parts,
    eps,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """A group's mean and reciprocal deviation out of its channels' in all parts (Chan et al., parallel variance)."""
    sample = (tl.program_id(0) // GROUPS).to(tl.int64)
    channels = tl.arange(0, BLOCK_SIZE)
    columns = (tl.program_id(0) % GROUPS) * SIZE + channels
    total = tl.zeros((BLOCK_PARTS, BLOCK_SIZE), dtype=tl.float32)
    for first in range(0, num_parts, BLOCK_PARTS):
        parts = first + tl.arange(0, BLOCK_PARTS)
        keep = (parts < num_parts)[:, None] & (channels < SIZE)[None, :]
        place = (sample * num_parts + parts)[:, None] * (GROUPS * SIZE) + columns[None, :]
        count = tl.minimum(num_rows - parts * (TILES * BLOCK_ROWS), TILES * BLOCK_ROWS)
        total += count[:, None] * tl.load(means + place, mask=keep, other=0.0)
    size = num_rows * SIZE
    centre = tl.sum(total) / size
    spread = tl.zeros((BLOCK_PARTS, BLOCK_SIZE), dtype=tl.float32)
    for first in range(0, num_parts, BLOCK_PARTS):
        parts = first + tl.arange(0, BLOCK_PARTS)
        keep = (parts < num_parts)[:, None] & (channels < SIZE)[None, :]
        place = (sample * num_parts + parts)[:, None] * (GROUPS * SIZE) + columns[None, :]
        count = tl.minimum(num_rows - parts * (TILES * BLOCK_ROWS), TILES * BLOCK_ROWS)
        off = tl.where(keep, tl.load(means + place, mask=keep, other=0.0) - centre, 0.0)
        spread += count[:, None] * off * off + tl.load(squares + place, mask=keep, other=0.0)
    tl.store(mean + tl.program_id(0), centre)
    tl.store(rstd + tl.program_id(0), 1.0 / tl.sqrt(tl.sum(spread) / size + eps))


@triton.jit
def _normed(x, mean, rstd, place, keep, GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """A tile before scale and shift, and the reciprocal deviation of each of its channels."""
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    group = tl.program_id(2) * GROUPS + tl.minimum(columns // SIZE, GROUPS - 1)
    scale = tl.load(rstd + group)
    found = tl.load(x + place, mask=keep, other=0.0).to(tl.float32)
    return (found - tl.load(mean + group)[None, :]) * scale[None, :], scale


@triton.jit
def _channel(values, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    return tl.load(values + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _apply_kernel(
    x,
    gamma,
    beta,
    mean,
    rstd,
    output,
    num_rows,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    place, keep = _tile(num_rows, tl.program_id(0) * BLOCK_ROWS, WIDTH, BLOCK_ROWS, BLOCK_WIDTH)
    normed, _ = _normed(x, mean, rstd, place, keep, GROUPS, SIZE, BLOCK_WIDTH)
    y = normed * _channel(gamma, WIDTH, BLOCK_WIDTH) + _channel(beta, WIDTH, BLOCK_WIDTH)
    tl.store(output + place, activated(y, ACTIVATION).to(output.dtype.element_ty), mask=keep)


@triton.jit
def _grad_sum_kernel(
    x,
    grad,
    gamma,
    beta,
    mean,
    rstd,
    grads,
    products,
    num_rows,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Of each channel in a part of the rows: the sum of gradients, and of their products with the normed input."""
    scale, shift = _channel(gamma, WIDTH, BLOCK_WIDTH), _channel(beta, WIDTH, BLOCK_WIDTH)
    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    product = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    for tile in range(TILES):
        first = (tl.program_id(0) * TILES + tile) * BLOCK_ROWS
        place, keep = _tile(num_rows, first, WIDTH, BLOCK_ROWS, BLOCK_WIDTH)
        normed, _ = _normed(x, mean, rstd, place, keep, GROUPS, SIZE, BLOCK_WIDTH)
        inner = tl.load(grad + place, mask=keep, other=0.0).to(tl.float32)
        inner = before_activation(inner, normed * scale + shift, ACTIVATION)
        total += inner
        product += inner * normed
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    own = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * WIDTH + columns
    tl.store(grads + own, tl.sum(total, axis=0), mask=columns < WIDTH)
    tl.store(products + own, tl.sum(product, axis=0), mask=columns < WIDTH)


@triton.jit
def _grad_join_kernel(
    grads,
    products,
    gamma,
    mean_grad,
    mean_product,
    grad_gamma,
    grad_beta,
    num_rows,
    num_parts,
    batch,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """A group's two means for its inputs' gradients, sample by sample, and its channels' gradients over all."""
    channels = tl.arange(0, BLOCK_SIZE)
    known = channels < SIZE
    columns = tl.program_id(0) * SIZE + channels
    scale = tl.load(gamma + columns, mask=known, other=0.0).to(tl.float32)
    all_grads = tl.zeros((BLOCK_SIZE,), dtype=tl.float32)
    all_products = tl.zeros((BLOCK_SIZE,), dtype=tl.float32)
    for sample in range(batch):
        total = tl.zeros((BLOCK_PARTS, BLOCK_SIZE), dtype=tl.float32)
        product = tl.zeros((BLOCK_PARTS, BLOCK_SIZE), dtype=tl.float32)
        for first in range(0, num_parts, BLOCK_PARTS):
            parts = first + tl.arange(0, BLOCK_PARTS)
            keep = (parts < num_parts)[:, None] & known[None, :]
            place = (sample * num_parts + parts).to(tl.int64)[:, None] * (GROUPS * SIZE) + columns[None, :]
            total += tl.load(grads + place, mask=keep, other=0.0)
            product += tl.load(products + place, mask=keep, other=0.0)
        grad_sum, product_sum = tl.sum(total, axis=0), tl.sum(product, axis=0)
        own = sample * GROUPS + tl.program_id(0)
        tl.store(mean_grad + own, tl.sum(grad_sum * scale) / (num_rows * SIZE))
        tl.store(mean_product + own, tl.sum(product_sum * scale) / (num_rows * SIZE))
        all_grads += grad_sum
        all_products += product_sum
    tl.store(grad_beta + columns, all_grads.to(grad_beta.dtype.element_ty), mask=known)
    tl.store(grad_gamma + columns, all_products.to(grad_gamma.dtype.element_ty), mask=known)


@triton.jit
def _grad_apply_kernel(
    x,
    grad,
    gamma,
    beta,
    mean,
    rstd,
    mean_grad,
    mean_product,
    grad_x,
    num_rows,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    scale, shift = _channel(gamma, WIDTH, BLOCK_WIDTH), _channel(beta, WIDTH, BLOCK_WIDTH)
    place, keep = _tile(num_rows, tl.program_id(0) * BLOCK_ROWS, WIDTH, BLOCK_ROWS, BLOCK_WIDTH)
    normed, deviation = _normed(x, mean, rstd, place, keep, GROUPS, SIZE, BLOCK_WIDTH)
    inner = tl.load(grad + place, mask=keep, other=0.0).to(tl.float32)
    inner = scale * before_activation(inner, normed * scale + shift, ACTIVATION)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    group = tl.program_id(2) * GROUPS + tl.minimum(columns // SIZE, GROUPS - 1)
    inner -= tl.load(mean_grad + group)[None, :] + normed * tl.load(mean_product + group)[None, :]
    tl.store(grad_x + place, (deviation[None, :] * inner).to(grad_x.dtype.element_ty), mask=keep)
