"""The one slice type: consecutive elements of a parameter, and where a flat tensor holds them.

DeepSpeed's files, its engines' partitions, running averages and the cutting of first weights all speak of these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """Consecutive elements of one flattened parameter inside a flat tensor.

    Attributes:
        name: The parameter's, as in ``named_parameters()``.
        first: First element in the flattened parameter.
        start: First element in the flat tensor.
        length: Elements; 0 where a rank holds none.
        rank: The rank that holds the flat tensor.
        group: The flat tensor's number among that rank's.
    """

    name: str
    first: int
    start: int
    length: int
    rank: int = 0
    group: int = 0

    def within(self, first: int, length: int) -> Slice | None:
        """What it holds of the parameter's elements ``first`` to ``first + length``; ``None`` for nothing."""
        low, high = max(first, self.first), min(first + length, self.first + self.length)
        if low >= high:
            return None
        return replace(self, first=low, start=self.start + low - self.first, length=high - low)

    def of(self, flat: Tensor) -> Tensor:
        """Its elements, a view of the flat tensor."""
        return flat[self.start : self.start + self.length]


def whole(name: str, numel: int) -> Slice:
    """A parameter that is in one piece, in a tensor of its own."""
    return Slice(name, 0, 0, numel)


def rank_slice(name: str, numel: int, part: int, rank: int, *, group: int = 0, start: int = 0) -> Slice:
    """ZeRO-3's cut: rank r has the r-th ``part`` elements of each parameter; the last ranks may have fewer, or none.

    Args:
        name: The parameter's.
        numel: Its elements.
        part: Elements of a rank's share, its padding counted.
        rank: The rank.
        group: The flat tensor's number.
        start: Where the share begins in it.
    """
    first = min(rank * part, numel)
    return Slice(name, first, start, min(part, numel - first), rank, group)
