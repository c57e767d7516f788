"""Laws of an order in which rare samples come more often: its counts, its length, and all that holds without."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sets import make_coco
from mmengine.dataset import ClassBalancedDataset
from streams import draws

from piip_scale.config.detection import DetectionData
from piip_scale.config.sampling import SamplingConfig
from piip_scale.config.segmentation import SegmentationData
from piip_scale.data.order import (
    EpochOrder,
    divisors,
    grouped_by_aspect,
    repeat_factors,
    repeated_order,
    repeated_size,
    repeats,
)
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.packing.verify import verify_shards
from piip_scale.data.reading.shards import ShardSet
from piip_scale.data.stream import epoch_size
from piip_scale.errors import DataError

PARTS = 2**32
SHARDS = st.lists(st.integers(1, 40), min_size=1, max_size=8)
FACTORS = st.lists(st.floats(1, 4), min_size=1, max_size=20)
SEEDS = st.tuples(st.integers(-(2**31), 2**31), st.integers(0, 1000))


def factors_of(values, sizes):
    """As many as there are samples, in parts."""
    return np.rint(np.resize(values, sum(sizes)) * PARTS).astype(np.int64)


def ordered(sizes, factors, seeds, num_streams=12):
    return repeated_order(sizes, factors, seed=seeds[0], epoch=seeds[1], num_streams=num_streams)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sets(st.integers(0, 8)), min_size=1, max_size=40), st.floats(0.001, 1))
def test_factors_are_those_of_mmengine(rows, threshold):
    samples = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    labels = np.array([label for row in rows for label in sorted(row)], np.int64)
    found = repeat_factors(samples, labels, len(rows), threshold=threshold)

    class Rows(list):
        def get_cat_ids(self, index):
            return list(self[index])

    known = Rows(rows)
    theirs = ClassBalancedDataset._get_repeat_factors(SimpleNamespace(dataset=known), known, threshold)
    np.testing.assert_allclose(found / PARTS, theirs, atol=1 / PARTS)


@settings(deadline=None)
@given(SHARDS, FACTORS, SEEDS)
def test_each_sample_comes_its_factor_rounded_and_all_epochs_are_as_long(sizes, values, seeds):
    factors = factors_of(values, sizes)
    order = ordered(sizes, factors, seeds)
    assert len(order) == repeated_size(factors) == sum(map(int, factors)) // PARTS
    assert len(set(order.tolist())) == len(order)
    counts = repeats(factors, seed=seeds[0], epoch=seeds[1])
    assert (counts >= factors // PARTS).all()
    assert (counts <= -(-factors // PARTS)).all()
    drawn = np.bincount(order % len(factors), minlength=len(factors))
    # One draw too many is left out, like the images of an epoch's last, incomplete step.
    assert (counts - drawn >= 0).all()
    assert (counts - drawn).sum() == counts.sum() - len(order) <= 1
    assert np.array_equal(order, ordered(sizes, factors, seeds))


def test_without_repeats_draws_are_sample_numbers():
    order = ordered([30, 12], factors_of([1.0], [42]), (0, 0))
    assert np.array_equal(np.sort(order), np.arange(42))


def test_over_many_epochs_each_sample_comes_as_often_as_its_factor_says():
    values = np.linspace(1, 3, 41)
    factors, epochs = factors_of(values, [41]), 4000
    counts = np.array([repeats(factors, seed=1, epoch=epoch) for epoch in range(epochs)])
    fractions = values % 1
    sigma = np.sqrt(fractions * (1 - fractions) / epochs)
    assert (np.abs(counts.mean(axis=0) - values) <= 5 * sigma + 1e-9).all()
    # Samples that follow each other are rounded up apart, not one in place of the other.
    ups = counts - factors // PARTS
    assert np.abs(np.corrcoef(ups[:, 1], ups[:, 2])[0, 1]) < 0.1


@settings(deadline=None, max_examples=60)
@given(SHARDS, FACTORS, SEEDS, st.sampled_from([1, 2, 4, 6, 12]), st.integers(1, 3), st.integers(1, 3), st.data())
def test_any_world_sees_the_same_micro_batches_and_resumes_anywhere(
    sizes, values, seeds, most_ranks, batch_size, factor, data
):
    micro_batches = most_ranks * factor
    sizes = [*sizes, micro_batches * batch_size]
    factors = factors_of(values, sizes)
    tall = np.array(data.draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes))))
    grouped, steps = data.draw(st.booleans()), len(ordered(sizes, factors, seeds)) // (micro_batches * batch_size)
    stop = data.draw(st.integers(0, steps))
    seen = []
    for num_ranks in divisors(most_ranks):
        order, accumulation = ordered(sizes, factors, seeds), micro_batches // num_ranks
        shares = [EpochOrder(len(order), num_ranks, rank, batch_size, accumulation) for rank in range(num_ranks)]
        if grouped:
            order = grouped_by_aspect(order, tall, shares[0], seed=seeds[0], epoch=seeds[1])
        assert {share.num_batches for share in shares} == {steps * accumulation}
        seen.append([share.batch(order, i).tolist() for i in range(steps * accumulation) for share in shares])
    assert all(batches == seen[0] for batches in seen)
    flat = [draw for batch in seen[0] for draw in batch]
    assert len(set(flat)) == len(flat) == steps * micro_batches * batch_size
    assert set(flat) <= set(ordered(sizes, factors, seeds).tolist())
    # Cut off at any step, and gone on with on other ranks, whose micro-batches are the same ones.
    cut = stop * micro_batches
    assert seen[0][:cut] + seen[-1][cut:] == seen[0]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    annotations, images = make_coco(folder, 41)
    root = json.loads(annotations.read_text())
    # Of category 2 one image is left: it is rare, and comes again.
    rare = [note for note in root["annotations"] if note["category_id"] == 2]
    for note in rare:
        note["category_id"] = 2 if note["image_id"] == rare[0]["image_id"] else 7
    # Neither a crowd nor a tiny box makes a class known.
    root["annotations"] += [
        {"id": 900 + i, "image_id": 100, "category_id": 2, "bbox": box, "area": 4, "iscrowd": crowd}
        | {"segmentation": [[box[0], box[1], box[0] + box[2], box[1], box[0], box[1] + box[3]]]}
        for i, (box, crowd) in enumerate((([1, 1, 20, 20], 1), ([1, 1, 0.5, 20], 0)))
    ]
    annotations.write_text(json.dumps(root))
    pack_coco(annotations, images, folder / "out", target_samples=9)
    return folder / "out"


def sampled(location, **keys):
    return draws(location, global_batch=4, sampling=SamplingConfig(kind="repeat_factor", threshold=0.25), **keys)


def test_shards_say_which_classes_their_images_have(packed):
    numbers, labels = ShardSet.open(packed).labels_of_samples
    # Categories are in the order of their ids: 2, then 7.
    expected = [(i, [0] if i == 1 else [1]) for i in range(41) if i % 4]
    assert list(zip(numbers.tolist(), ([label] for label in labels.tolist()), strict=True)) == expected
    assert verify_shards(packed, workers=1).problems == ()


def test_rare_images_come_more_often_with_other_chance_each_time(packed):
    config = DetectionData(train_shards="", val_shards="", sampling={"kind": "repeat_factor", "threshold": 0.25})
    factor = np.sqrt(0.25 * 41)
    assert epoch_size(ShardSet.open(packed), config) == int(40 + factor)
    (stream,) = sampled(packed)
    assert len(stream) == int(40 + factor) // 4
    found = [sample for batch in stream.batches(0) for sample in batch]
    (key, times) = Counter(key for key, _ in found).most_common(1)[0]
    assert key == "000000000101"
    assert times in (3, 4)
    assert len({chance for name, chance in found if name == key}) == times
    assert [key for micro in stream.keys(0, range(len(stream))) for key in micro] == [key for key, _ in found]
    assert [s for batch in stream.batches(0, 5) for s in batch] == found[20:]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_world_streams_the_same_steps_from_shards(packed, num_ranks):
    (alone,) = sampled(packed)
    streams = [list(stream.batches(3)) for stream in sampled(packed, per_node=num_ranks, workers=0)]
    steps = [sorted(sample for batch in step for sample in batch) for step in zip(*streams, strict=True)]
    assert steps == [sorted(batch) for batch in alone.batches(3)]


def test_a_set_of_before_is_named(packed, tmp_path):
    shards = ShardSet.open(packed)
    shards.has_category_ids = False
    stream = sampled(packed)[0]
    stream.shards = shards
    with pytest.raises(DataError, match=r"do not say which classes each image has; data.sampling.*pack the set again"):
        len(stream)
    stream.config = stream.config.model_copy(update={"sampling": None})
    assert len(stream) == 10


def test_label_maps_cannot_be_counted_by_image():
    with pytest.raises(ValueError, match="sets of label maps do not say: leave sampling out"):
        SegmentationData(train_shards="", val_shards="", sampling={"kind": "repeat_factor"})
