"""Constants of a grid of cells, made once for a size and device."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


def cell_centres(height: int, width: int, device: torch.device) -> Tensor:
    """Centres of a grid's cells, x then y, 0 and 1 being its outer edges; float32 (height, width, 2), not to change."""
    return _constant(_make_centres, height, width, device)


def grid_size(height: int, width: int, device: torch.device) -> Tensor:
    """Cells of a grid's sides, x then y; float32 (2), not to change."""
    return _constant(_make_size, height, width, device)


def _constant(
    make: Callable[[int, int, torch.device], Tensor], height: int, width: int, device: torch.device
) -> Tensor:
    # A compiler makes constants of its own out of what it traces, and must not find one that was made elsewhere.
    return make(height, width, device) if torch.compiler.is_compiling() else _made(make, height, width, device)


# Once for a grid, not by 7 kernels at each of 24 attentions of a pass; a training of many scales meets hundreds of
# grids of some 32 KB. Outside of inference mode, whose tensors no training may use.
@lru_cache(maxsize=512)
@torch.inference_mode(mode=False)  # type: ignore[untyped-decorator]
def _made(make: Callable[[int, int, torch.device], Tensor], height: int, width: int, device: torch.device) -> Tensor:
    return make(height, width, device)


def _make_centres(height: int, width: int, device: torch.device) -> Tensor:
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    return torch.stack((x.expand(height, width), y[:, None].expand(height, width)), -1)


def _make_size(height: int, width: int, device: torch.device) -> Tensor:
    # Sent without waiting for the device: images of many sizes come.
    return torch.tensor((width, height), dtype=torch.float32, device="cpu").to(device, non_blocking=True)
