"""The order of an epoch: a pure function of the seed, the epoch and the shards, cut among the ranks.

The shards are put in a random order, each shard's samples too, and the long row that results is cut into C canonical
streams, each shuffled inside a window of a few shards. Reading the streams in turn gives the canonical order: its
sample p is of stream p mod C. A global batch is the next G samples; its M micro-batches of B images are dealt out like
cards, the j-th taking every M-th of them from the j-th on, and micro-batch j belongs to rank j mod W. Rank r then takes
the samples at p = r (mod W), so where W divides C it reads whole streams and few shards; other W part streams among
them and read more. As long as G and B stay, the very micro-batches of a global step are the same for every W. The world
changes nothing but who reads what; a resume point is (epoch, step).

Where rare samples come more often, what is ordered are draws: draw d is of sample d mod N, for the (d div N)-th time in
its epoch. Without repeats draws are the sample numbers.

Source: the canonical streams are mosaicml/streaming's idea; here they are cut by samples, so that only an epoch's last
incomplete global batch is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Literal

import numpy as np
import numpy.typing as npt

from piip_scale.errors import DataError

WINDOW_SHARDS = 8
"""Shards of a stream that are shuffled together: more mixes better and keeps more remote shards on disk."""

ASPECT_WINDOW_STEPS = 16
"""Steps whose images of one shape are brought together; more leaves fewer mixed micro-batches."""

# Apart, so that a sample's randomness never repeats the order's.
_ORDER, _SAMPLE, _ASPECT, _REPEAT = 0, 1, 2, 3

Indices = npt.NDArray[np.int64]

_STREAMS_AT_LEAST = 48
# Repeat factors are whole numbers of these parts: their sums are exact, and the same on every machine.
_PARTS = 1 << 32


def streams_for(num_streams: Literal["auto"] | int, num_ranks: int) -> int:
    """The canonical streams of a run that begins on these ranks, each of which then reads whole ones.

    Args:
        num_streams: ``data.num_streams``.
        num_ranks: Data-parallel ranks.
    """
    # 48 is what any number of ranks that divides it shares, as it was before there was a choice.
    return lcm(_STREAMS_AT_LEAST, num_ranks) if num_streams == "auto" else num_streams


def canonical_order(
    num_samples_of_shard: Sequence[int],
    *,
    seed: int,
    epoch: int,
    num_streams: int,
    window_shards: int = WINDOW_SHARDS,
) -> Indices:
    """The whole epoch's order, the same for every world.

    Args:
        num_samples_of_shard: Samples in each shard; sample numbers run through the shards in this order.
        seed: Of the run.
        epoch: Counted from 0.
        num_streams: C, the canonical streams.
        window_shards: Shards that are shuffled together inside a stream.

    Returns:
        A permutation of all N sample numbers, int64 (N,).
    """
    sizes = np.asarray(num_samples_of_shard, np.int64)
    num_samples = int(sizes.sum())
    random = _philox(_ORDER, seed, epoch)
    shard_order = _shuffled(len(sizes), random)
    starts = np.cumsum(sizes) - sizes
    row = np.concatenate([starts[shard] + _shuffled(int(sizes[shard]), random) for shard in shard_order])
    position_of_shard = np.repeat(np.arange(len(sizes)), sizes[shard_order])
    order = np.empty(num_samples, np.int64)
    first = 0
    for stream in range(min(num_streams, num_samples)):
        length = -(-(num_samples - stream) // num_streams)
        cut = slice(first, first + length)
        order[stream::num_streams] = _windowed(row[cut], position_of_shard[cut], window_shards, random)
        first += length
    return order


def _shuffled(length: int, random: np.random.Philox) -> Indices:
    # Sorting raw bits: numpy keeps a bit generator's stream across versions, but not what Generator makes of it.
    return np.argsort(random.random_raw(length), kind="stable")


def _windowed(stream: Indices, position_of_shard: Indices, window_shards: int, random: np.random.Philox) -> Indices:
    window = (position_of_shard - position_of_shard[0]) // window_shards
    return stream[np.lexsort((random.random_raw(len(stream)), window))]


def repeat_factors(samples: Indices, labels: Indices, num_samples: int, *, threshold: float) -> Indices:
    """How often each sample is to come in an epoch: a class of a share f of the samples, sqrt(threshold / f) times.

    Args:
        samples: A sample's number for each class that it shows, int64 (L,).
        labels: That class, int64 (L,); a sample shows each once.
        num_samples: N.
        threshold: Classes of a smaller share of the samples come more often, up to that.

    Returns:
        The largest factor of a sample's classes, at least 1, in parts of 2**-32, int64 (N,).

    Source: Gupta et al., LVIS: A Dataset for Large Vocabulary Instance Segmentation, appendix B.2.
    """
    shares = np.bincount(labels) / num_samples
    factors = np.ones(num_samples)
    np.maximum.at(factors, samples, np.sqrt(threshold / shares[labels]))
    parts: Indices = np.rint(factors * _PARTS).astype(np.int64)
    return parts


def repeated_size(factors: Indices) -> int:
    """Draws of every epoch: the whole part of the sum of all factors.

    Args:
        factors: As ``repeat_factors`` returns them.
    """
    return int((factors // _PARTS).sum() + (factors % _PARTS).sum() // _PARTS)


def repeats(factors: Indices, *, seed: int, epoch: int) -> Indices:
    """How often each sample comes in an epoch: its factor, rounded up as often as the fractional part says.

    All fractions are rounded by one draw, along a random row of the samples, so that their sum is the factors' but for
    less than 1: of independent draws, as LVIS's paper has them, epochs would have other lengths.

    Args:
        factors: As ``repeat_factors`` returns them.
        seed: Of the run.
        epoch: Counted from 0.

    Returns:
        int64 (N,), whose sum is ``repeated_size`` or one more.
    """
    random = _philox(_REPEAT, seed, epoch)
    row = _shuffled(len(factors), random)
    ends = np.cumsum(factors[row] % _PARTS) + int(random.random_raw()) % _PARTS
    counts: Indices = factors // _PARTS
    counts[row] += np.diff(ends // _PARTS, prepend=0)
    return counts


def repeated_order(
    num_samples_of_shard: Sequence[int],
    factors: Indices,
    *,
    seed: int,
    epoch: int,
    num_streams: int,
    window_shards: int = WINDOW_SHARDS,
) -> Indices:
    """A whole epoch's order in which samples come as often as ``repeats`` says, the same for every world.

    The canonical order of shards that hold each sample so often; where there is one draw too many, the last is left
    out, which may be any.

    Args:
        num_samples_of_shard: As of ``canonical_order``.
        factors: As ``repeat_factors`` returns them.
        seed: Of the run.
        epoch: Counted from 0.
        num_streams: C, the canonical streams.
        window_shards: Shards that are shuffled together inside a stream.

    Returns:
        Draws, each once, int64 (``repeated_size``,).
    """
    counts = repeats(factors, seed=seed, epoch=epoch)
    ends = np.concatenate([[0], np.cumsum(counts)])
    times = np.arange(ends[-1]) - np.repeat(ends[:-1], counts)
    draws: Indices = np.repeat(np.arange(len(counts)), counts) + times * len(counts)
    sizes = np.diff(ends[np.concatenate([[0], np.cumsum(num_samples_of_shard)])]).tolist()
    order = canonical_order(sizes, seed=seed, epoch=epoch, num_streams=num_streams, window_shards=window_shards)
    return draws[order][: repeated_size(factors)]


@dataclass(frozen=True)
class EpochOrder:
    """One rank's share of an epoch.

    Attributes:
        num_samples: Of an epoch.
        num_ranks: W.
        rank: This rank.
        batch_size: Images of a micro-batch.
        accumulation: Micro-batches of each rank that make a global batch.
    """

    num_samples: int
    num_ranks: int
    rank: int
    batch_size: int
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch_size:
            raise DataError(
                f"a set of {self.num_samples} images",
                rule=f"a step takes {self.batch_size * self.accumulation} on each of {self.num_ranks} ranks"
                f" = {self.global_batch_size}",
                fix="use fewer ranks, a smaller data.micro_batch_size or train.gradient_accumulation, or add images",
            )

    @property
    def global_batch_size(self) -> int:
        """G, the images of one step on all ranks."""
        return self.num_ranks * self.accumulation * self.batch_size

    @property
    def num_batches(self) -> int:
        """Micro-batches of an epoch, the same on every rank; they make whole steps."""
        return self.num_samples // self.global_batch_size * self.accumulation

    def batch(self, order: Indices, micro_step: int) -> Indices:
        """This rank's samples of a micro-step, int64 (batch_size,).

        Args:
            order: The epoch's ``canonical_order`` or ``repeated_order``.
            micro_step: Counted from 0 in the epoch.
        """
        step, turn = divmod(micro_step, self.accumulation)
        begin = step * self.global_batch_size
        first = begin + turn * self.num_ranks + self.rank
        return order[first : begin + self.global_batch_size : self.num_ranks * self.accumulation]


def grouped_by_aspect(
    order: Indices,
    is_tall: npt.NDArray[np.bool_],
    share: EpochOrder,
    *,
    seed: int,
    epoch: int,
    window_steps: int = ASPECT_WINDOW_STEPS,
) -> Indices:
    """The epoch's order with tall images in micro-batches of their own, wide ones in others.

    The j-th micro-batches of the steps of a window trade images among each other alone, and come in a random order
    afterwards, so that a step holds both shapes as before. Hence everything that is true of the canonical order stays
    so: it is a permutation, the same for every world whose micro-batches are the same in size and number; ranks read
    their own streams; the images left out at the end are the same. At most one micro-batch of each j and window holds
    both shapes.

    Args:
        order: The epoch's ``canonical_order`` or ``repeated_order``.
        is_tall: Of every sample of the set, bool (N,).
        share: Of it the number of micro-batches and their size count, not whose share it is.
        seed: Of the run.
        epoch: Counted from 0.
        window_steps: Steps of a window.

    Returns:
        int64, as long as ``order``, to be read by ``EpochOrder.batch``.
    """
    size, turns = share.batch_size, share.num_ranks * share.accumulation
    num_steps = len(order) // share.global_batch_size
    random = _philox(_ASPECT, seed, epoch)
    grouped = order.copy()
    for first in range(0, num_steps, window_steps):
        steps = min(window_steps, num_steps - first)
        window = slice(first * share.global_batch_size, (first + steps) * share.global_batch_size)
        # As the j-th micro-batch is dealt out: every turns-th sample from the j-th on.
        rows = order[window].reshape(steps * size, turns).T
        sorted_rows = np.take_along_axis(rows, np.argsort(is_tall[rows % len(is_tall)], axis=1, kind="stable"), axis=1)
        batches = sorted_rows.reshape(turns, steps, size)
        positions = np.argsort(random.random_raw(turns * steps).reshape(turns, steps), axis=1, kind="stable")
        mixed = np.take_along_axis(batches, positions[:, :, None], axis=1)
        grouped[window] = mixed.reshape(turns, steps * size).T.ravel()
    return grouped


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def evaluation_batches(num_samples: int, *, num_ranks: int, rank: int, batch_size: int) -> list[Indices]:
    """This rank's batches of a pass that sees every sample, in the set's order.

    Every rank gets equally many full batches: the last ones repeat samples from the start.
    """
    num_steps = -(-num_samples // (num_ranks * batch_size))
    positions = np.arange(num_steps * batch_size, dtype=np.int64) * num_ranks + rank
    return list((positions % num_samples).reshape(num_steps, batch_size))


def whole_batches(num_samples: int, *, num_ranks: int, rank: int, batch_size: int) -> list[Indices]:
    """This rank's batches of a pass that sees every sample once, in the set's order; ranks have different numbers.

    Batches are the same on any number of ranks, dealt out in turn, so that what depends on who shares a batch, as its
    padding does, stays the same; the last is as long as what is left.
    """
    firsts = range(rank * batch_size, num_samples, num_ranks * batch_size)
    return [np.arange(first, min(first + batch_size, num_samples), dtype=np.int64) for first in firsts]


def random_of(seed: int, epoch: int, number: int) -> np.random.Generator:
    """The randomness of a sample in an epoch, whoever draws it."""
    return np.random.Generator(_philox(_SAMPLE, seed, epoch, number))


def _philox(purpose: int, seed: int, *numbers: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence([purpose, seed % (1 << 32), *numbers]))
