"""Which branch a finding rests on: what each branch adds to the merged features there.

A branch's share of a region is the mean length, over the region's cells, of the vector that it adds to the merged map
(its map on the common width, times its merging weight), over the sum of all branches' mean lengths. The maps are those
after the last stage. It says where the features that the heads read come from, not where the information in them does:
branches have exchanged theirs in the interaction units before. No gradients, and no second pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from piip_scale.models.merging import Merging

WHOLE = (0.0, 0.0, 1.0, 1.0)
"""The region that is all of a canvas."""


class BranchShares:
    """Listens to a network while it looks at one image: a context manager.

    Args:
        model: A trained model; without merging (of a single branch) nothing is heard.
    """

    def __init__(self, model: nn.Module) -> None:
        mergings = [module for module in model.modules() if isinstance(module, Merging)]
        self._parts: list[Any] = list(mergings[-1].parts) if mergings else []
        self._handles: list[Any] = []
        self._lengths: dict[int, Tensor] = {}

    def __enter__(self) -> BranchShares:
        for index, part in enumerate(self._parts):
            self._handles.append(part.layers.register_forward_hook(self._listener(index, part)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def of(self, regions: Sequence[tuple[float, float, float, float]]) -> list[list[float]]:
        """The branches' shares, largest model first, summing to 1, of regions of the canvas that was looked at last.

        Args:
            regions: Left, top, right and bottom, as shares of the canvas.

        Returns:
            A list a region; empty lists where there is nothing to compare.
        """
        if not self._lengths:
            return [[] for _ in regions]
        height, width = (max(length.shape[axis] for length in self._lengths.values()) for axis in (0, 1))
        lengths = torch.stack([_resized(self._lengths[index], height, width) for index in sorted(self._lengths)])
        return [_shares(lengths[:, _cells(r[1], r[3], height), _cells(r[0], r[2], width)]) for r in regions]

    def _listener(self, index: int, part: Any) -> Any:
        def listen(module: nn.Module, inputs: Any, map_BCHW: Tensor) -> None:  # axes, as everywhere
            self._lengths[index] = (map_BCHW[0].float() * part.weight.float()).norm(dim=0).cpu()

        return listen


def _resized(length_HW: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(length_HW[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]


def _cells(low: float, high: float, count: int) -> slice:
    """Cells that a range touches, at least one."""
    first = min(max(int(low * count), 0), count - 1)
    return slice(first, max(first + 1, min(-int(-high * count // 1), count)))


def _shares(lengths_NHW: Tensor) -> list[float]:
    means = lengths_NHW.mean(dim=(1, 2))
    return [round(share, 4) for share in (means / means.sum().clamp(min=torch.finfo().tiny)).tolist()]
