"""Fetching shards ahead of the batches that need them; which ones, and when, follows from the order alone."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from piip_scale.data.reading.sources import Stop, StoppedError
from piip_scale.errors import DataError, FetchError
from piip_scale.logging import get_logger

_THREADS = 4
_Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShardUse:
    """Which shards a rank's batches read, in the order in which they need them first.

    Attributes:
        shards: Numbers, int64 (S,), each once.
        first_batch: The batch that needs each first, int64 (S,), ascending.
        last_batch: The batch that reads each last, int64 (S,).
    """

    shards: _Numbers
    first_batch: _Numbers
    last_batch: _Numbers

    def most_bytes_at_once(self, num_bytes_of_shard: Sequence[int]) -> int:
        """The most that is in use at a time: what a cache must hold if nothing is to be fetched twice."""
        sizes = np.asarray(num_bytes_of_shard, np.int64)[self.shards]
        changes = np.zeros(int(self.last_batch.max(initial=0)) + 2, np.int64)
        np.add.at(changes, self.first_batch, sizes)
        np.subtract.at(changes, self.last_batch + 1, sizes)
        return int(changes.cumsum().max())


def shard_use(shards_of_batches: Sequence[_Numbers]) -> ShardUse:
    """The use of shards by batches, given the shard of every sample of each batch."""
    row = np.concatenate([np.empty(0, np.int64), *shards_of_batches])
    batch = np.repeat(np.arange(len(shards_of_batches)), [len(shards) for shards in shards_of_batches])
    shards, first = np.unique(row, return_index=True)
    last = len(row) - 1 - np.unique(row[::-1], return_index=True)[1]
    order = np.argsort(first, kind="stable")
    return ShardUse(shards[order], batch[first[order]], batch[last[order]])


class Prefetcher:
    """Fetches shards in threads, a bounded number ahead.

    What fails in passing is left to whoever needs the shard, who tries again; what no try will mend is an ``error``
    at once.

    Args:
        fetch: Fetches a shard by number.
        shards: In the order in which they are needed.
        first_batch: The batch that needs each, ascending.
        ahead: Shards fetched beyond those that are needed already.

    Attributes:
        error: What must end the run.
    """

    def __init__(
        self, fetch: Callable[[int, Stop], None], shards: Sequence[int], first_batch: Sequence[int], ahead: int
    ) -> None:
        self.error: DataError | None = None
        self._fetch, self._shards, self._first_batch, self._ahead = fetch, shards, first_batch, ahead
        self._stop, self._moved = Stop(), threading.Condition()
        self._next, self._allowed = 0, 0
        count = min(_THREADS, ahead, len(shards))
        self._threads = [threading.Thread(target=self._run, name="prefetch", daemon=True) for _ in range(count)]

    def start(self) -> None:
        """Begins; after processes were forked, which would share its files otherwise."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends what is under way, and waits for it."""
        self._stop.set()
        with self._moved:
            self._moved.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def advance(self, batch: int) -> None:
        """Reports that loading has come to a batch.

        Raises:
            DataError: A shard that is needed soon will not come.
        """
        if self.error is not None:
            raise self.error
        with self._moved:
            self._allowed = bisect_right(self._first_batch, batch) + self._ahead
            self._moved.notify_all()

    def _run(self) -> None:
        while (shard := self._next_shard()) is not None:
            try:
                self._fetch(shard, self._stop)
            except StoppedError:
                return
            except DataError as error:
                if isinstance(error, FetchError) and not error.is_final:
                    get_logger(__name__).warning("%s; it will be tried again when it is needed", error)
                    continue
                self.error = error
                self._stop.set()

    def _next_shard(self) -> int | None:
        with self._moved:
            self._moved.wait_for(lambda: self._stop.is_set() or self._next < min(self._allowed, len(self._shards)))
            if self._stop.is_set():
                return None
            self._next += 1
            return self._shards[self._next - 1]
