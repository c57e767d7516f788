"""Batches of one shape through the loader: less padding, the same samples, the same on every world."""

import numpy as np
import pytest
from made_sets import write_jpeg

from piip_scale.config.detection import AugmentConfig, DetectionData
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.reading.files import json_bytes
from piip_scale.data.reading.shards import ShardSet
from piip_scale.data.samples.detection import DetectionSamples
from piip_scale.data.stream import ShardLoader
from piip_scale.world import World

AUGMENT = AugmentConfig(short_edge_px=(64,), max_edge_px=96, pad_multiple_px=32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """48 images, every third of them tall."""
    folder = tmp_path_factory.mktemp("aspect")
    root = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for number in range(48):
        height, width = (96, 64) if number % 3 == 0 else (64, 96)
        write_jpeg(folder / "images" / f"{number}.jpg", height, width, number)
        root["images"].append({"id": number, "file_name": f"{number}.jpg", "height": height, "width": width})
    (folder / "ann.json").write_bytes(json_bytes(root))
    pack_coco(folder / "ann.json", folder / "images", folder / "out", target_samples=7)
    return ShardSet.open(folder / "out")


def loader(shards, num_ranks, rank, *, grouped, accumulation=1, workers=0):
    data = DetectionData(train_shards="-", val_shards="-", micro_batch_size=2, num_streams=4, workers=workers)
    world = World(rank, num_ranks, rank, num_ranks, "127.0.0.1", 1, "torchrun")
    maker = DetectionSamples(shards, AUGMENT)
    return ShardLoader(shards, data, maker, seed=3, world=world, accumulation=accumulation, group_by_aspect=grouped)


def ids_and_sizes(batches):
    return [[info.image_id for info in batch.infos] for batch in batches], [b.images_BHWC.shape[1:3] for b in batches]


def test_grouped_batches_are_the_same_samples_with_less_padding(shards):
    plain, plain_sizes = ids_and_sizes(list(loader(shards, 1, 0, grouped=False).batches(0)))
    ids, sizes = ids_and_sizes(list(loader(shards, 1, 0, grouped=True).batches(0)))
    assert sorted(np.ravel(ids)) == sorted(np.ravel(plain)) == list(range(48))
    mixed = sum(size == (96, 96) for size in sizes)
    assert mixed <= 2 < sum(size == (96, 96) for size in plain_sizes)


def test_grouped_batches_are_the_same_on_every_world_and_after_a_resume(shards):
    def micro_batches(num_ranks, first_step, workers=0):
        accumulation = 4 // num_ranks
        shares = [
            ids_and_sizes(
                loader(shards, num_ranks, rank, grouped=True, accumulation=accumulation, workers=workers).batches(
                    1, first_step * accumulation
                )
            )[0]
            for rank in range(num_ranks)
        ]
        return [batch for turn in zip(*shares, strict=True) for batch in turn]

    whole = micro_batches(1, 0)
    assert micro_batches(2, 0) == micro_batches(4, 0) == whole
    assert micro_batches(2, 3, workers=1) == whole[3 * 4 :]
