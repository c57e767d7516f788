"""A set that is open is handed on, and held to whatever it is wanted for."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
from made_sets import make_coco
from sections.file_operations import count_operations

from piip_scale.config.run import CacheConfig, DataConfig
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.reading.opened import OpenedSets
from piip_scale.data.reading.shards import ShardSet
from piip_scale.errors import DataError


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack_coco(*make_coco(folder), folder / "set", workers=1, target_samples=4)
    return folder / "set"


@pytest.fixture
def data(packed):
    return DataConfig(train_shards=str(packed), val_shards=str(packed))


def test_a_set_is_opened_once_by_a_look_and_a_file_for_each_shard(packed, data):
    sets = OpenedSets()
    with count_operations(packed) as operations:
        opened = sets.open(str(packed), data)
    num_shards = len(opened.manifest.shards)
    assert num_shards > 1
    assert operations == Counter(stat=1 + num_shards, open=1 + num_shards)
    with count_operations(packed) as operations:
        assert sets.open(str(packed), data, ("b", "a"), "detection") is opened
        assert sets.find(str(packed), data) is opened
    assert not operations


@pytest.mark.parametrize(
    ("classes", "kind", "max_pixels"), [(("a", "b"), None, 10**6), ((), "segmentation", 10**6), ((), None, 99)]
)
def test_an_open_set_is_refused_as_one_that_is_opened(packed, data, classes, kind, max_pixels):
    asked = data.model_copy(update={"max_pixels": max_pixels})
    with pytest.raises(DataError) as opening:
        ShardSet.open(str(packed), classes, kind, max_pixels=max_pixels)
    sets = OpenedSets()
    sets.open(str(packed), data)
    with pytest.raises(DataError) as again:
        sets.open(str(packed), asked, classes, kind)
    assert again.value.line == opening.value.line


def test_another_place_is_another_set(packed, data, tmp_path):
    sets, elsewhere = OpenedSets(), data.model_copy(update={"cache": CacheConfig(folder=str(tmp_path))})
    opened = sets.open(str(packed), data)
    assert sets.open(str(packed), elsewhere) is not opened
    shutil.copytree(packed, tmp_path / "copy")
    assert sets.open(str(tmp_path / "copy"), data) is not opened
    assert sets.find(str(tmp_path / "absent"), data) is None
