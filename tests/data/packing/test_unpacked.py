"""Sets as their sources have them hold what packing makes of them."""

import cv2
import numpy as np
import pytest

from piip_scale.data.packing.pack_classes import folder_source, pack_folders
from piip_scale.data.packing.pack_maps import label_map_source, pack_label_maps
from piip_scale.data.packing.packing import PackOptions
from piip_scale.data.packing.unpacked import UnpackedSet
from piip_scale.data.reading.raw import UnreadableSample
from piip_scale.data.reading.shards import ShardSet
from piip_scale.errors import DataError

HOW = PackOptions(workers=1)


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(6):
        for folder in ("photos/cat", "photos/dog", "maps/cat", "maps/dog"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        name = f"{('cat', 'dog')[number % 2]}/{number}"
        cv2.imwrite(str(tmp_path / "photos" / f"{name}.jpg"), rng.integers(0, 255, (20 + number, 30, 3), np.uint8))
        cv2.imwrite(str(tmp_path / "maps" / f"{name}.png"), rng.integers(0, 3, (20 + number, 30), np.uint8))
    return tmp_path


def assert_same(unpacked, packed):
    assert list(unpacked.keys) == packed.keys.tolist()
    assert (unpacked.classes, unpacked.map_rule) == (packed.classes, packed.map_rule)
    assert [unpacked.read(number) for number in range(len(packed))] == [packed.read(n) for n in range(len(packed))]


def test_label_maps(folders):
    photos, maps, classes = folders / "photos", folders / "maps", ("sky", "road")
    pack_label_maps(photos, maps, folders / "shards", classes=classes, reduce_zero_label=True, how=HOW)
    source = label_map_source(photos, maps, classes=classes, reduce_zero_label=True, how=HOW)
    assert_same(UnpackedSet(source, HOW, "segmentation", "maps"), ShardSet.open(folders / "shards"))
    with pytest.raises(DataError, match="is a set for segmentation; this needs one for detection"):
        UnpackedSet(source, HOW, "detection", "maps")


def test_image_folders(folders):
    pack_folders(folders / "photos", folders / "shards", how=HOW)
    unpacked = UnpackedSet(folder_source(folders / "photos", how=HOW), HOW, "classification", "photos")
    assert_same(unpacked, ShardSet.open(folders / "shards"))
    (folders / "photos" / "cat" / "0.jpg").unlink()
    broken = 0
    for number in range(len(unpacked)):
        try:
            unpacked.read(number)
        except UnreadableSample:
            broken += 1
    assert broken == 1
