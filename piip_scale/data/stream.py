"""Shards to batches: this rank's share of an epoch, in an order that seed, epoch and world decide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from piip_scale.config.run import DataConfig
from piip_scale.data.loader import Batches, BatchT, SampleMaker, SetLoader
from piip_scale.data.order import (
    EpochOrder,
    Indices,
    canonical_order,
    grouped_by_aspect,
    repeat_factors,
    repeated_order,
    repeated_size,
    streams_for,
)
from piip_scale.data.reading.cache import GIB
from piip_scale.data.reading.prefetch import Prefetcher, ShardUse, shard_use
from piip_scale.data.reading.shards import ShardSet
from piip_scale.logging import get_logger
from piip_scale.world import World


def epoch_size(shards: ShardSet, config: DataConfig) -> int:
    """Images of a pass over a training set, those that come more than once counted so often.

    Raises:
        DataError: ``data.sampling`` needs to know which classes images have, and the set does not say.
    """
    return _size(shards, _factors(shards, config))


def _size(shards: ShardSet, factors: Indices | None) -> int:
    return len(shards) if factors is None else repeated_size(factors)


def _factors(shards: ShardSet, config: DataConfig) -> Indices | None:
    """How often each sample is to come in an epoch; ``None`` where each comes once."""
    if config.sampling is None:
        return None
    return repeat_factors(*shards.labels_of_samples, len(shards), threshold=config.sampling.threshold)


class ShardLoader(SetLoader[BatchT]):
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
        super().__init__(shards, config, maker, seed=seed, world=world, broken_samples=broken_samples)
        self.shards, self.accumulation, self.group_by_aspect = shards, accumulation, group_by_aspect
        self._has_warned_of_cache = False

    @property
    def order(self) -> EpochOrder:
        """This rank's share of an epoch.

        Raises:
            DataError: A step takes more images than there are, or ``data.sampling`` asks for what the set does not say.
        """
        return EpochOrder(
            num_samples=_size(self.shards, self._factors),
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
        return self._loaded(Batches(self.shards, self.maker, requests, self.seed, epoch), requests, epoch + 1)

    def keys(self, epoch: int, micro_steps: Iterable[int]) -> list[list[str]]:
        """The keys of the samples that this rank's batches of an epoch ask for, by micro-step; loads none of them."""
        share, order = self.order, self._epoch_order(epoch)
        names = self.shards.keys
        return [[str(names[draw % len(names)]) for draw in share.batch(order, step)] for step in micro_steps]

    @cached_property
    def _factors(self) -> Indices | None:
        return _factors(self.shards, self.config)

    def _requests(self, epoch: int, first_step: int = 0) -> list[Indices]:
        share, order = self.order, self._epoch_order(epoch)
        return [share.batch(order, step) for step in range(first_step, share.num_batches)]

    def _epoch_order(self, epoch: int) -> Indices:
        streams = streams_for(self.config.num_streams, self.world.num_ranks)
        sizes = self.shards.num_samples_of_shard
        if self._factors is None:
            order = canonical_order(sizes, seed=self.seed, epoch=epoch, num_streams=streams)
        else:
            order = repeated_order(sizes, self._factors, seed=self.seed, epoch=epoch, num_streams=streams)
        if not self.group_by_aspect:
            return order
        is_tall = self.shards.sizes_px[:, 0] > self.shards.sizes_px[:, 1]
        return grouped_by_aspect(order, is_tall, self.order, seed=self.seed, epoch=epoch)

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
            "shards will be fetched again and again; raise it, make data.num_streams a small multiple of the ranks, "
            "or pack smaller shards",
            self.shards.location,
            ranks,
            needed_gib,
            limit_gib,
        )

    def _use(self, requests: Sequence[np.ndarray]) -> ShardUse:
        return shard_use([self.shards.shard_of(draws % len(self.shards)) for draws in requests])
