"""Laws of the order: a permutation, shared without loss or repetition, the same for every world."""

from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piip_scale.data.order import EpochOrder, canonical_order, divisors, evaluation_batches, random_of
from piip_scale.errors import DataError

SHARDS = st.lists(st.integers(1, 60), min_size=1, max_size=12)
SEEDS = st.tuples(st.integers(-(2**31), 2**31), st.integers(0, 1000))


def ranks(num_samples, num_streams, num_ranks, batch_size, accumulation=1):
    sizes = (num_samples, num_streams, num_ranks)
    return [EpochOrder(*sizes, rank, batch_size, accumulation) for rank in range(num_ranks)]


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
    for num_ranks in divisors(gcd(num_streams, global_batch)):
        shares = ranks(len(order), num_streams, num_ranks, global_batch // num_ranks)
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
        shares = ranks(len(order), 12, num_ranks, batch_size, micro_batches // num_ranks)
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
    before, after = (ranks(len(order), 12, num_ranks, 24 // num_ranks) for num_ranks in worlds)
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
    shares = ranks(100, 48, 2, 4)
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


def test_impossible_worlds_say_what_is_possible():
    with pytest.raises(DataError, match="one of 1, 2, 3, 4, 6, 12; "):
        EpochOrder(100, 12, 5, 0, 2)
    with pytest.raises(DataError, match="4 on each of 6 ranks = 24"):
        EpochOrder(23, 12, 6, 0, 4)


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


@settings(deadline=None, max_examples=80)
@given(SHARDS, SEEDS, st.integers(1, 4), st.integers(1, 8), st.integers(1, 3), st.data())
def test_nodes_and_ranks_share_an_epoch_of_uneven_shards_exactly(sizes, seeds, nodes, per_node, batch_size, data):
    num_ranks = nodes * per_node
    sizes = [*sizes, num_ranks * batch_size]
    num_streams = num_ranks * data.draw(st.integers(1, 4))
    order = canonical_order(sizes, seed=seeds[0], epoch=seeds[1], num_streams=num_streams)
    shares = ranks(len(order), num_streams, num_ranks, batch_size)
    assert {share.num_batches for share in shares} == {len(order) // (num_ranks * batch_size)}
    numbers = [n for share in shares for step in range(share.num_batches) for n in share.batch(order, step).tolist()]
    assert len(set(numbers)) == len(numbers) == shares[0].num_batches * num_ranks * batch_size
    # What is left out is the end of the order, less than a global batch, and not what came before.
    assert set(numbers) == set(order[: len(numbers)].tolist())
    assert len(order) - len(numbers) < num_ranks * batch_size
