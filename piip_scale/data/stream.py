"""Shards to batches: this rank's share of an epoch, decoded and augmented in worker processes."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from piip_scale.config.run import DataConfig
from piip_scale.data.batch import Batch
from piip_scale.data.order import (
    EpochOrder,
    Indices,
    canonical_order,
    evaluation_batches,
    grouped_by_aspect,
    random_of,
)
from piip_scale.data.reading.broken import BrokenSample, BrokenSamples
from piip_scale.data.reading.cache import GIB
from piip_scale.data.reading.prefetch import Prefetcher, ShardUse, shard_use
from piip_scale.data.reading.raw import RawSample
from piip_scale.data.reading.shards import ShardSet
from piip_scale.errors import DataError
from piip_scale.logging import get_logger
from piip_scale.world import World

MAX_NEIGHBOURS = 16
"""A broken sample is replaced by the next whole one, at most this far on: a longer run of them is no accident."""

Flag = Any
"""A boolean in shared memory; ctypes has no type for it that a checker knows."""

# What Slurm, a terminal or a launcher sends to every process of a job: it is for the training process to act on.
_PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_WATCH_SECONDS = 0.2
_BATCHES_OF_WORKER = 2


BatchT = TypeVar("BatchT", bound=Batch, covariant=True)
_Made = TypeVar("_Made")


class Packed(Protocol[BatchT]):
    """A batch on its way from a worker, in few tensors: each that changes process takes a file descriptor."""

    def pin_memory(self) -> Self:
        """A copy in page-locked memory."""
        ...

    def batch(self) -> BatchT:
        """The batch."""
        ...


class SampleMaker(Protocol[BatchT]):
    """How a task makes batches of its samples; it is copied into the loader's processes."""

    def sample(self, raw: RawSample, rng: np.random.Generator | None) -> Any:
        """A decoded and augmented sample; without chance, as for evaluation, where ``rng`` is ``None``.

        Raises:
            DataError: The sample is broken.
        """
        ...

    def collate(self, samples: Sequence[Any], *, training: bool) -> Packed[BatchT]:
        """A batch of what ``sample`` returned."""
        ...


@dataclass(frozen=True)
class _Loaded(Generic[BatchT]):
    """A batch, and what was replaced to make it whole."""

    packed: Packed[BatchT]
    num_samples: int
    broken: tuple[BrokenSample, ...]

    def pin_memory(self) -> _Loaded[BatchT]:
        """Torch's loader calls it by this name."""
        return replace(self, packed=self.packed.pin_memory())


class ShardLoader(Generic[BatchT]):
    """Batches of a packed set for one rank.

    Args:
        shards: The set.
        config: How many samples a batch has, and who loads them.
        maker: How they become batches.
        seed: Of the run: order and augmentations follow from it.
        world: This rank among all.
        accumulation: Micro-batches of each rank in a step: with the ranks it decides which samples share a batch.
        group_by_aspect: Tall and wide images train in batches of their own.
        broken_samples: A folder of the run, for all ranks: samples that are broken are reported once in the run, and
            counted together. With ``None`` each rank reports its own.

    Attributes:
        num_seen: Samples asked for so far.
        num_broken: Those of them that had to be replaced.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: DataConfig,
        maker: SampleMaker[BatchT],
        *,
        seed: int,
        world: World,
        accumulation: int = 1,
        group_by_aspect: bool = False,
        broken_samples: Path | None = None,
    ) -> None:
        self.shards, self.config, self.maker, self.seed, self.world = shards, config, maker, seed, world
        self.accumulation, self.group_by_aspect = accumulation, group_by_aspect
        self.num_seen = self.num_broken = 0
        limit = config.max_broken_share * len(shards) / (1 if broken_samples else world.num_ranks)
        folder = broken_samples / shards.short_id if broken_samples else None
        self._broken = BrokenSamples(shards.location, limit, folder)
        self._has_warned_of_cache = False

    @property
    def order(self) -> EpochOrder:
        """This rank's share of an epoch.

        Raises:
            DataError: The ranks do not divide the canonical streams, or a step takes more images than there are.
        """
        return EpochOrder(
            num_samples=len(self.shards),
            num_streams=self.config.num_streams,
            num_ranks=self.world.num_ranks,
            rank=self.world.rank,
            batch_size=self.config.micro_batch_size,
            accumulation=self.accumulation,
        )

    def __len__(self) -> int:
        """Training batches of an epoch, the same on every rank."""
        return self.order.num_batches

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[BatchT]:
        """This rank's training batches of an epoch from a micro-step on, the same as if it had started at 0.

        Raises:
            DataError: A shard is gone, or too many samples are broken.
        """
        requests = self._requests(epoch, first_step)
        return self._loaded(_Batches(self.shards, self.maker, requests, self.seed, epoch), requests, epoch + 1)

    def _requests(self, epoch: int, first_step: int = 0) -> list[Indices]:
        share, order = self.order, self._epoch_order(epoch)
        return [share.batch(order, step) for step in range(first_step, share.num_batches)]

    def _epoch_order(self, epoch: int) -> Indices:
        order = canonical_order(
            self.shards.num_samples_of_shard, seed=self.seed, epoch=epoch, num_streams=self.config.num_streams
        )
        if not self.group_by_aspect:
            return order
        is_tall = self.shards.sizes_px[:, 0] > self.shards.sizes_px[:, 1]
        return grouped_by_aspect(order, is_tall, self.order, seed=self.seed, epoch=epoch)

    def val_batches(self) -> Iterator[BatchT]:
        """This rank's batches of a pass over the whole set, without chance.

        Equally many on every rank; the last repeat samples from the start, which a metric knows by ``image_id``.

        Raises:
            DataError: A shard is gone, or too many samples are broken.
        """
        requests = evaluation_batches(
            len(self.shards),
            num_ranks=self.world.num_ranks,
            rank=self.world.rank,
            batch_size=self.config.micro_batch_size,
        )
        return self._loaded(_Batches(self.shards, self.maker, requests, self.seed, None), requests)

    def _loaded(
        self, batches: _Batches[BatchT], requests: Sequence[np.ndarray], next_epoch: int | None = None
    ) -> Iterator[BatchT]:
        ends = _closing(os.getpid()), _flag()
        loader = DataLoader(
            batches,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.config.workers,
            prefetch_factor=_BATCHES_OF_WORKER if self.config.workers else None,
            # Python 3.14 starts processes in another way, which would open every shard's index again.
            multiprocessing_context="fork" if self.config.workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=partial(_start_worker, ends, os.getpid()),
            # Without one of its own it would draw from the global generator, and a resumed run would differ.
            generator=torch.Generator(),
        )
        with contextlib.closing(self._prefetcher(requests, next_epoch)) as prefetcher:
            # Workers ask for batches that nobody has taken yet.
            begun = self.config.workers * _BATCHES_OF_WORKER
            prefetcher.advance(begun)
            for number, loaded in enumerate(_named_worker_deaths(loader, ends, prefetcher.start)):
                if isinstance(loaded, DataError):
                    raise loaded
                prefetcher.advance(number + 1 + begun)
                self._count(loaded)
                yield loaded.packed.batch()

    def _prefetcher(self, requests: Sequence[np.ndarray], next_epoch: int | None) -> Prefetcher:
        """Fetches the shards of these batches in time, and then those that the next epoch begins with."""
        ahead = self.config.cache.prefetch_shards
        if not self.shards.files.is_remote or not ahead:
            return Prefetcher(self.shards.fetch, (), (), 0)
        use = self._use(requests)
        self._warn_of_small_cache(use)
        then = [] if next_epoch is None else self._use(self._requests(next_epoch)).shards[:ahead].tolist()
        first_batch = use.first_batch.tolist() + [len(requests)] * len(then)
        return Prefetcher(self.shards.fetch, use.shards.tolist() + then, first_batch, ahead)

    def _warn_of_small_cache(self, use: ShardUse) -> None:
        """Logs once a node that its cache cannot hold what is in use at a time, so that shards come more than once."""
        sizes = [shard.size_bytes for shard in self.shards.manifest.shards]
        limit_gib, ranks = self.config.cache.limit_gib, self.world.ranks_per_node
        needed_gib = min(use.most_bytes_at_once(sizes) * ranks, sum(sizes)) / GIB
        if self._has_warned_of_cache or self.world.local_rank or needed_gib <= limit_gib:
            return
        self._has_warned_of_cache = True
        get_logger(__name__).warning(
            "%s: the %d rank(s) of a node read up to %.3g GiB of shards at a time, and data.cache.limit_gib=%.3g: "
            "shards will be fetched again and again; raise it, bring data.num_streams nearer to the number of ranks, "
            "or pack smaller shards",
            self.shards.location,
            ranks,
            needed_gib,
            limit_gib,
        )

    def _use(self, requests: Sequence[np.ndarray]) -> ShardUse:
        return shard_use([self.shards.shard_of(numbers) for numbers in requests])

    def _count(self, loaded: _Loaded[BatchT]) -> None:
        self.num_seen += loaded.num_samples
        self.num_broken += len(loaded.broken)
        for sample in loaded.broken:
            self._broken.add(sample)


class _Batches(Dataset["_Loaded[BatchT] | DataError"], Generic[BatchT]):
    """Batch by number, made from scratch by whichever process is asked; ``epoch`` is ``None`` for evaluation."""

    def __init__(
        self,
        shards: ShardSet,
        maker: SampleMaker[BatchT],
        requests: Sequence[np.ndarray],
        seed: int,
        epoch: int | None,
    ) -> None:
        self._shards, self._maker, self._requests = shards, maker, requests
        self._seed, self._epoch = seed, epoch

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int) -> _Loaded[BatchT] | DataError:
        # Errors are returned: torch would raise ours again with a traceback for its message.
        try:
            return self._batch([int(number) for number in self._requests[index]])
        except DataError as error:
            return error

    def _batch(self, numbers: Sequence[int]) -> _Loaded[BatchT]:
        broken: list[BrokenSample] = []
        samples = [self._sample_or_neighbour(number, broken) for number in numbers]
        packed = self._maker.collate(samples, training=self._epoch is not None)
        return _Loaded(packed, len(samples), tuple(broken))

    def _sample_or_neighbour(self, number: int, broken: list[BrokenSample]) -> Any:
        for distance in range(min(MAX_NEIGHBOURS, len(self._shards))):
            # Outside the try: a shard that is gone must not be taken for a broken sample.
            raw = self._shards.read((number + distance) % len(self._shards))
            rng = None if self._epoch is None else random_of(self._seed, self._epoch, number)
            try:
                return self._maker.sample(raw, rng)
            except DataError as error:
                reason = str(error)
            if not distance:
                broken.append(BrokenSample(raw.key, reason))
        raise DataError(
            f"no whole sample among {MAX_NEIGHBOURS} from {self._shards.keys[number]} on",
            rule=f"the last: {reason}",
            fix="pack the set again",
        )


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _named_worker_deaths(
    loader: DataLoader[_Made], ends: tuple[Flag, Flag], on_start: Callable[[], None]
) -> Iterator[_Made]:
    closing, leaving = ends
    try:
        iterator = iter(loader)
        on_start()
        # Last registered, first called: before torch waits seconds for workers that do not know of the end.
        atexit.unregister(_announce_end)
        atexit.register(_announce_end, closing)
        yield from iterator
    # Tensors that a worker had ready are fetched from it: where it died first, that is what fails.
    except (RuntimeError, ConnectionError, FileNotFoundError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise DataError(
            "a loader process died",
            value=(str(error) or type(error).__name__).splitlines()[0],
            rule="most often of too little memory, or too little room in /dev/shm",
            fix="use fewer data.workers",
        ) from error
    finally:
        # Before torch waits seconds for workers that wait for a shard themselves.
        leaving.value = True


@cache
def _closing(pid: int) -> Flag:
    """Becomes true once the process with that id is about to end."""
    return _flag()


def _flag() -> Flag:
    # Not an Event: setting one waits for whoever waits for it, and hangs where such a process was killed.
    return multiprocessing.RawValue(ctypes.c_bool, False)


def _announce_end(closing: Flag) -> None:
    closing.value = True


def _start_worker(ends: Sequence[Flag], parent_pid: int, _: int) -> None:
    """Leaves the job's signals to the parent, which saves and stops; the worker ends with it, however it ends."""
    import cv2

    cv2.setNumThreads(0)
    for number in _PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while not any(end.value for end in ends) and os.getppid() == parent_pid:
            time.sleep(_WATCH_SECONDS)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
