"""Tensors of files by our names, some of them joined from several, which happens when somebody looks at one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Joined:
    """Tensors that lie below each other in one of ours: queries', keys' and values' projections.

    Attributes:
        parts: Of equal shapes but for the first axis.
    """

    parts: tuple[Tensor, ...]

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return torch.Size((sum(len(part) for part in self.parts), *self.parts[0].shape[1:]))

    def whole(self) -> Tensor:
        """The whole, in memory of its own."""
        return torch.cat(self.parts)


Value = Tensor | Joined


class Weights(Mapping[str, Tensor]):
    """Tensors by name. A joined one is made anew for whoever asks: nobody holds all of them at once.

    Args:
        values: By name.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self.values_as_read = dict(values)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, whole."""
        value = self.values_as_read[name]
        return value.whole() if isinstance(value, Joined) else value

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.values_as_read)

    def __len__(self) -> int:
        """How many."""
        return len(self.values_as_read)

    def below(self, prefix: str) -> dict[str, Value]:
        """The same values, not yet joined, by names behind a prefix."""
        return {prefix + name: value for name, value in self.values_as_read.items()}
