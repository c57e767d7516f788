"""Laws of the order: a permutation, shared without loss or repetition, the same for every world."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piip_scale.data.order import (
    EpochOrder,
    canonical_order,
    divisors,
    evaluation_batches,
    grouped_by_aspect,
    random_of,
    streams_for,
)
from piip_scale.errors import DataError

SHARDS = st.lists(st.integers(1, 60), min_size=1, max_size=12)
SEEDS = st.tuples(st.integers(-(2**31), 2**31), st.integers(0, 1000))


def ranks(num_samples, num_ranks, batch_size, accumulation=1):
    return [EpochOrder(num_samples, num_ranks, rank, batch_size, accumulation) for rank in range(num_ranks)]


@settings(deadline=None)
@given(SHARDS, SEEDS, st.integers(1, 60), st.integers(1, 4))
def test_every_sample_once(sizes, seeds, num_streams, window_shards):
    order = canonical_order(sizes, seed=seeds[0], epoch=seeds[1], num_streams=num_streams, window_shards=window_shards)
    assert np.array_equal(np.sort(order), np.arange(sum(sizes)))
    again = canonical_order(sizes, seed=seeds[0], epoch=seeds[1], num_streams=num_streams, window_shards=window_shards)
    assert np.array_equal(order, again)


@settings(deadline=None, max_examples=60)
@given(SHARDS, SEEDS, st.sampled_from([4, 6, 12, 48]), st.integers(1, 3), st.data())
def test_every_world_sees_the_same_global_batches(sizes, seeds, num_streams, factor, data):
    global_batch = factor * data.draw(st.sampled_from(divisors(num_streams)))
    if sum(sizes) < global_batch:
        sizes = [*sizes, global_batch]
    order = canonical_order(sizes, seed=seeds[0], epoch=seeds[1], num_streams=num_streams)
    seen = []
    for num_ranks in divisors(global_batch):
        shares = ranks(len(order), num_ranks, global_batch // num_ranks)
        assert {share.num_batches for share in shares} == {len(order) // global_batch}
        steps = [[share.batch(order, step) for share in shares] for step in range(shares[0].num_batches)]
        assert all(len(batch) == global_batch // num_ranks for step in steps for batch in step)
        seen.append([sorted(np.concatenate(step).tolist()) for step in steps])
    assert all(batches == seen[0] for batches in seen)
    union = [number for batch in seen[0] for number in batch]
    assert len(set(union)) == len(union) == len(order) // global_batch * global_batch


@settings(deadline=None, max_examples=60)
@given(SHARDS, SEEDS, st.sampled_from([1, 2, 4, 6, 12]), st.integers(1, 3), st.integers(1, 3))
def test_micro_batches_stay_together_on_every_world(sizes, seeds, most_ranks, batch_size, factor):
    micro_batches = most_ranks * factor
    sizes = [*sizes, micro_batches * batch_size]
    order = canonical_order(sizes, seed=seeds[0], epoch=seeds[1], num_streams=12)
    seen = []
    for num_ranks in divisors(most_ranks):
        shares = ranks(len(order), num_ranks, batch_size, micro_batches // num_ranks)
        seen.append([share.batch(order, i).tolist() for i in range(shares[0].num_batches) for share in shares])
        # A rank reads its own streams only, whoever else there is.
        position = np.empty(len(order), np.int64)
        position[order] = np.arange(len(order))
        for share in shares:
            own = np.concatenate([share.batch(order, i) for i in range(share.num_batches)])
            assert set(position[own] % num_ranks) == {share.rank}
    assert all(batches == seen[0] for batches in seen)
    assert len(seen[0]) == len(order) // (micro_batches * batch_size) * micro_batches


@settings(deadline=None, max_examples=60)
@given(SHARDS, SEEDS, st.sampled_from([(1, 6), (6, 2), (12, 3), (4, 4)]), st.floats(0, 1))
def test_resuming_on_another_world_loses_and_repeats_nothing(sizes, seeds, worlds, share):
    sizes = [*sizes, 24]
    order = canonical_order(sizes, seed=seeds[0], epoch=seeds[1], num_streams=12)
    before, after = (ranks(len(order), num_ranks, 24 // num_ranks) for num_ranks in worlds)
    stop = int(share * before[0].num_batches)
    seen = [rank.batch(order, step) for step in range(stop) for rank in before]
    # A resumed run computes the order anew, from the seed and the epoch alone.
    again = canonical_order(sizes, seed=seeds[0], epoch=seeds[1], num_streams=12)
    seen += [rank.batch(again, step) for step in range(stop, after[0].num_batches) for rank in after]
    assert sorted(np.concatenate(seen)) == sorted(order[: len(order) // 24 * 24])


@settings(deadline=None, max_examples=60)
@given(SHARDS, SEEDS, st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_ranks_read_few_shards(sizes, seeds, num_ranks):
    sizes = [*sizes, 12]
    order = canonical_order(sizes, seed=seeds[0], epoch=seeds[1], num_streams=12)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    pairs = {(p % num_ranks, shard_of[number]) for p, number in enumerate(order.tolist())}
    # Cutting a row of S shards into 12 pieces divides at most 11 of them; ranks hold whole pieces.
    assert len(pairs) <= len(sizes) + 11


def test_hundred_images_in_one_shard_on_two_ranks():
    order = canonical_order([100], seed=0, epoch=0, num_streams=48)
    shares = ranks(100, 2, 4)
    seen = np.concatenate([share.batch(order, step) for step in range(12) for share in shares])
    assert shares[0].num_batches == 12
    assert len(set(seen.tolist())) == 96


def test_epochs_differ_and_leave_out_others():
    orders = [canonical_order([30, 41], seed=5, epoch=epoch, num_streams=4) for epoch in range(20)]
    assert len({order.tobytes() for order in orders}) == 20
    assert len({number for order in orders for number in order[64:].tolist()}) > 50
    assert not np.array_equal(orders[0], canonical_order([30, 41], seed=6, epoch=0, num_streams=4))


@pytest.mark.parametrize("sizes", [[100], [10] * 10, [55, 3, 42]])
def test_first_batch_is_a_fair_draw(sizes):
    epochs = 2000
    counts = np.zeros(100)
    for epoch in range(epochs):
        counts[canonical_order(sizes, seed=1, epoch=epoch, num_streams=20)[:8]] += 1
    expected, sigma = epochs * 0.08, np.sqrt(epochs * 0.08 * 0.92)
    assert np.abs(counts - expected).max() < 5 * sigma


def test_a_set_smaller_than_a_step_says_so():
    with pytest.raises(DataError, match="23 images; a step takes 4 on each of 6 ranks = 24"):
        EpochOrder(23, 6, 0, 4)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_sees_everything_and_ranks_stay_in_step(num_samples, num_ranks, batch_size):
    shares = [
        evaluation_batches(num_samples, num_ranks=num_ranks, rank=rank, batch_size=batch_size)
        for rank in range(num_ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    flat = np.concatenate([batch for share in shares for batch in share])
    assert len(flat) == len(shares[0]) * num_ranks * batch_size < num_samples + num_ranks * batch_size
    assert set(flat.tolist()) == set(range(num_samples))


def test_randomness_belongs_to_the_sample():
    draws = {random_of(seed, epoch, number).random() for seed in (0, 1) for epoch in (0, 1) for number in range(50)}
    assert len(draws) == 200
    assert random_of(3, 4, 5).random() == random_of(3, 4, 5).random()


WORLDS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
"""Nodes, ranks of a node, micro-batches of a rank, images of a micro-batch."""


@settings(deadline=None, max_examples=150)
@given(SHARDS, SEEDS, WORLDS, st.integers(1, 3), st.integers(0, 3))
def test_nodes_ranks_and_workers_share_an_epoch_exactly(sizes, seeds, world, factor, num_workers):
    nodes, ranks_per_node, accumulation, batch_size = world
    num_ranks, num_streams = nodes * ranks_per_node, nodes * ranks_per_node * factor
    sizes = [*sizes, num_ranks * accumulation * batch_size]
    order = canonical_order(sizes, seed=seeds[0], epoch=seeds[1], num_streams=num_streams)
    shares = ranks(len(order), num_ranks, batch_size, accumulation)
    # Torch deals a rank's batches out to its processes in turn, and collects them in the same turn.
    processes = max(num_workers, 1)
    turns = [range(worker, shares[0].num_batches, processes) for worker in range(processes)]
    seen = np.concatenate([share.batch(order, step) for share in shares for turn in turns for step in turn])
    whole = shares[0].global_batch_size * (len(order) // shares[0].global_batch_size)
    assert {share.num_batches for share in shares} == {whole // (num_ranks * batch_size)}
    assert np.array_equal(np.sort(seen), np.sort(order[:whole]))
    assert len(order) - whole < shares[0].global_batch_size


@pytest.mark.parametrize("num_ranks", [1, 2, 6, 7, 32, 48, 64, 96, 128, 512, 4096])
def test_streams_left_to_the_ranks_are_whole_ones_and_those_of_before_where_these_fitted(num_ranks):
    streams = streams_for("auto", num_ranks)
    assert streams % num_ranks == 0
    assert (streams == 48) == (48 % num_ranks == 0)
    assert streams_for(12, num_ranks) == 12


@settings(deadline=None, max_examples=100)
@given(SHARDS, SEEDS, st.sampled_from([1, 2, 4, 6, 12]), st.integers(1, 4), st.integers(1, 3), st.data())
def test_grouping_by_aspect_keeps_the_laws_of_the_order(sizes, seeds, most_ranks, batch_size, factor, data):
    micro_batches = most_ranks * factor
    sizes = [*sizes, micro_batches * batch_size]
    window_steps = data.draw(st.integers(1, 5))
    tall = np.array(data.draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes))))
    order = canonical_order(sizes, seed=seeds[0], epoch=seeds[1], num_streams=12)

    def group(share):
        return grouped_by_aspect(order, tall, share, seed=seeds[0], epoch=seeds[1], window_steps=window_steps)

    seen = []
    for num_ranks in divisors(most_ranks):
        shares = ranks(len(order), num_ranks, batch_size, micro_batches // num_ranks)
        grouped = group(shares[0])
        assert all(np.array_equal(grouped, group(share)) for share in shares)
        assert np.array_equal(np.sort(grouped), np.arange(len(order)))
        whole = shares[0].num_batches * num_ranks * batch_size
        assert np.array_equal(grouped[whole:], order[whole:])
        seen.append([share.batch(grouped, i).tolist() for i in range(shares[0].num_batches) for share in shares])
        # A rank reads its own streams only, whoever else there is.
        position = np.empty(len(order), np.int64)
        position[order] = np.arange(len(order))
        for share in shares:
            own = np.concatenate([share.batch(grouped, i) for i in range(share.num_batches)])
            assert set(position[own] % num_ranks) == {share.rank}
    assert all(batches == seen[0] for batches in seen)
    steps = len(order) // (micro_batches * batch_size)
    for turn in range(micro_batches):
        for first in range(0, steps, window_steps):
            batches = [seen[0][s * micro_batches + turn] for s in range(first, min(first + window_steps, steps))]
            assert sum(len({tall[number] for number in batch}) == 2 for batch in batches) <= 1


def test_grouping_leaves_a_step_as_mixed_as_it_was():
    sizes, rng = [500] * 40, np.random.default_rng(0)
    tall = rng.random(sum(sizes)) < 0.3
    order = canonical_order(sizes, seed=0, epoch=0, num_streams=48)
    share = ranks(len(order), 8, 2)[0]
    grouped = grouped_by_aspect(order, tall, share, seed=0, epoch=0)
    steps = grouped[: len(order) // 16 * 16].reshape(-1, 16)
    assert abs(tall[steps].mean(axis=1).std() - np.sqrt(2 * 0.3 * 0.7 / 16)) < 0.01
    pairs = np.concatenate([share.batch(grouped, step).reshape(1, 2) for step in range(share.num_batches)])
    assert (tall[pairs[:, 0]] != tall[pairs[:, 1]]).mean() < 0.05
    # Neither shape comes early or late in the epoch.
    thirds = np.array_split(tall[grouped], 3)
    assert max(abs(part.mean() - tall.mean()) for part in thirds) < 0.02
