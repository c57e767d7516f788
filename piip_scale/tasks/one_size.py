"""Looking at several images at once where that changes nothing: images that fill one canvas alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def by_size(items: Sequence[T], size_of: Callable[[T], Hashable], run: Callable[[list[T]], Sequence[Any]]) -> list[Any]:
    """The results of all items in their order, those of one size computed together.

    A canvas larger than an image's own would be more of nothing to look at, and what is found would change with the
    images beside it.

    Args:
        items: What is looked at.
        size_of: What items that are looked at together have in common.
        run: The results of such items.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(size_of(item), []).append(index)
    found: dict[int, Any] = {}
    for indices in groups.values():
        found |= zip(indices, run([items[index] for index in indices]), strict=True)
    return [found[index] for index in range(len(items))]
