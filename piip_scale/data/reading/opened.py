"""The packed sets that a process has open, handed on from whoever opens one first."""

from __future__ import annotations

from collections.abc import Sequence

from piip_scale.config.run import CacheConfig, DataConfig
from piip_scale.data.reading.set_files import has_manifest
from piip_scale.data.reading.shards import ShardSet
from piip_scale.registry import SetKind


class OpenedSets:
    """Packed sets by their places: each is opened once, however often it is asked for.

    Opening reads the manifest and every index, and looks at every shard: on a shared disk, as often as there are ranks.
    A set that changes meanwhile stays as it was opened.
    """

    def __init__(self) -> None:
        self._opened: dict[tuple[str, CacheConfig], ShardSet] = {}

    def open(
        self, location: str, data: DataConfig, classes: Sequence[str] = (), kind: SetKind | None = None
    ) -> ShardSet:
        """A set that is whole, and what it is wanted for this time.

        Args:
            location: Where it is, as ``ShardSet.open`` takes it.
            data: Where it is kept on this node, and how large its images may be.
            classes: The class names expected, in label order; empty takes the set's own.
            kind: The kind expected; ``None`` takes any.

        Raises:
            DataError: As of ``ShardSet.open``.
        """
        place = location, data.cache
        if place in self._opened:
            self._opened[place].check(classes, kind, data.max_pixels)
        else:
            self._opened[place] = ShardSet.open(location, classes, kind, data.cache, data.max_pixels)
        return self._opened[place]

    def find(self, location: str, data: DataConfig, classes: Sequence[str] = ()) -> ShardSet | None:
        """A set of any kind; ``None`` where no finished one is.

        Raises:
            DataError: It is damaged, or of other classes; or nobody answers there.
        """
        if (location, data.cache) not in self._opened and not has_manifest(location, data.cache):
            return None
        return self.open(location, data, classes)
