"""Samples by number to batches, decoded and augmented in worker processes: what packed sets and others share."""

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
from piip_scale.data.order import evaluation_batches, random_of, whole_batches
from piip_scale.data.reading.broken import BrokenSample, BrokenSamples
from piip_scale.data.reading.parents_signals import held_back, leave_to_parent
from piip_scale.data.reading.prefetch import Prefetcher
from piip_scale.data.reading.raw import RawSample, UnreadableSample
from piip_scale.data.reading.sample_set import SampleSet
from piip_scale.errors import DataError
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
    """A batch, and what was replaced to make it whole, or left out; ``None`` where nothing is left."""

    packed: Packed[BatchT] | None
    num_samples: int
    broken: tuple[BrokenSample, ...]

    def pin_memory(self) -> _Loaded[BatchT]:
        """Torch's loader calls it by this name."""
        return self if self.packed is None else replace(self, packed=self.packed.pin_memory())


class SetLoader(Generic[BatchT]):
    """Batches of a set for one rank, without chance.

    Args:
        samples: The set.
        config: How many samples a batch has, and who loads them.
        maker: How they become batches.
        seed: Of the run.
        world: This rank among all.
        broken_samples: A folder of the run, for all ranks: samples that are broken are reported once in the run, and
            counted together. With ``None`` each rank reports its own.

    Attributes:
        num_seen: Samples asked for so far.
        num_broken: Those of them that had to be replaced or left out.
    """

    def __init__(
        self,
        samples: SampleSet,
        config: DataConfig,
        maker: SampleMaker[BatchT],
        *,
        seed: int,
        world: World,
        broken_samples: Path | None = None,
    ) -> None:
        self.samples, self.config, self.maker, self.seed, self.world = samples, config, maker, seed, world
        self.num_seen = self.num_broken = 0
        limit = config.max_broken_share * len(samples) / (1 if broken_samples else world.num_ranks)
        folder = broken_samples / samples.short_id if broken_samples else None
        self._broken = BrokenSamples(samples.location, limit, folder)

    def val_batches(self) -> Iterator[BatchT]:
        """This rank's batches of a pass over the whole set.

        Equally many on every rank; the last repeat samples from the start, which a metric knows by ``image_id``.

        Raises:
            DataError: A shard is gone, or too many samples are broken.
        """
        requests = evaluation_batches(
            len(self.samples),
            num_ranks=self.world.num_ranks,
            rank=self.world.rank,
            batch_size=self.config.micro_batch_size,
        )
        return self._loaded(Batches(self.samples, self.maker, requests, self.seed, None), requests)

    def own_batches(self) -> Iterator[BatchT]:
        """This rank's batches of a pass in which every sample is in one batch of one rank.

        Ranks may have different numbers of batches. A broken sample is left out; each rank may meet as many as the
        whole set may have.

        Raises:
            DataError: A shard is gone, or too many samples are broken.
        """
        self._broken = BrokenSamples(
            self.samples.location, self.config.max_broken_share * len(self.samples), done="is left out"
        )
        requests = self.own_requests()
        return self._loaded(Batches(self.samples, self.maker, requests, self.seed, None, replaces=False), requests)

    def own_requests(self) -> list[np.ndarray]:
        """The numbers of the samples of each of ``own_batches``, int64."""
        world, size = self.world, self.config.micro_batch_size
        return whole_batches(len(self.samples), num_ranks=world.num_ranks, rank=world.rank, batch_size=size)

    def _loaded(
        self, batches: Batches[BatchT], requests: Sequence[np.ndarray], next_epoch: int | None = None
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
                if loaded.packed is not None:
                    yield loaded.packed.batch()

    def _prefetcher(self, requests: Sequence[np.ndarray], next_epoch: int | None) -> Prefetcher:
        """Brings what these batches need, and then the next epoch, to this node in time; here all is there."""
        return Prefetcher(lambda *_: None, (), (), 0)

    def _count(self, loaded: _Loaded[BatchT]) -> None:
        self.num_seen += loaded.num_samples
        self.num_broken += len(loaded.broken)
        for sample in loaded.broken:
            self._broken.add(sample)


class Batches(Dataset["_Loaded[BatchT] | DataError"], Generic[BatchT]):
    """Batch by number, made from scratch by whichever process is asked.

    Args:
        samples: The set.
        maker: How its samples become batches.
        requests: The numbers of each batch's samples, or their draws where they come more than once.
        seed: Of the run.
        epoch: ``None`` for evaluation.
        replaces: A broken sample is replaced by a neighbour, not left out.
    """

    def __init__(
        self,
        samples: SampleSet,
        maker: SampleMaker[BatchT],
        requests: Sequence[np.ndarray],
        seed: int,
        epoch: int | None,
        *,
        replaces: bool = True,
    ) -> None:
        self._samples, self._maker, self._requests = samples, maker, requests
        self._seed, self._epoch, self._replaces = seed, epoch, replaces

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int) -> _Loaded[BatchT] | DataError:
        # Errors are returned: torch would raise ours again with a traceback for its message.
        try:
            return self._batch([int(draw) for draw in self._requests[index]])
        except DataError as error:
            return error

    def _batch(self, draws: Sequence[int]) -> _Loaded[BatchT]:
        broken: list[BrokenSample] = []
        make = self._sample_or_neighbour if self._replaces else self._sample
        samples = (make(draw % len(self._samples), draw, broken) for draw in draws)
        made = [sample for sample in samples if sample is not None]
        packed = self._maker.collate(made, training=self._epoch is not None) if made else None
        return _Loaded(packed, len(draws), tuple(broken))

    def _sample(self, number: int, drawn: int, broken: list[BrokenSample]) -> Any:
        """A sample, with the chance of the one of number ``drawn``; ``None``, and a note, where it is broken."""
        key = str(self._samples.keys[number])
        try:
            raw = self._samples.read(number)
        # Not any other error: a shard that is gone must not be taken for a broken sample.
        except UnreadableSample as error:
            broken.append(BrokenSample(key, str(error)))
            return None
        rng = None if self._epoch is None else random_of(self._seed, self._epoch, drawn)
        try:
            return self._maker.sample(raw, rng)
        except DataError as error:
            broken.append(BrokenSample(key, str(error)))
            return None

    def _sample_or_neighbour(self, number: int, drawn: int, broken: list[BrokenSample]) -> Any:
        met: list[BrokenSample] = []
        for distance in range(min(MAX_NEIGHBOURS, len(self._samples))):
            sample = self._sample((number + distance) % len(self._samples), drawn, met)
            if sample is not None:
                broken += met[:1]
                return sample
        raise DataError(
            f"no whole sample among {MAX_NEIGHBOURS} from {self._samples.keys[number]} on",
            rule=f"the last: {met[-1].reason}",
            fix="pack the set again",
        )


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _named_worker_deaths(
    loader: DataLoader[_Made], ends: tuple[Flag, Flag], on_start: Callable[[], None]
) -> Iterator[_Made]:
    closing, leaving = ends
    try:
        with held_back(_PARENTS_SIGNALS):
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
    leave_to_parent(_PARENTS_SIGNALS)

    def watch() -> None:
        while not any(end.value for end in ends) and os.getppid() == parent_pid:
            time.sleep(_WATCH_SECONDS)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
