"""The demo's data set: deterministic, exact, and honest about what validation has seen."""

import json
import sys

import numpy as np
import pytest
import simplejpeg
from pycocotools import mask as coco_mask
from sklearn.datasets import load_digits, load_sample_images

from piip_scale.data.packing.coco import read_coco
from piip_scale.demo.scenes import MIN_VISIBLE_SHARE, _draw_scene, _material, digit_scans, write_scenes
from piip_scale.errors import DataError

ARGUMENTS = {"num_train": 12, "num_val": 5, "size_px": 128, "seed": 7}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), **ARGUMENTS)


def test_without_the_extra_that_brings_the_digits_a_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DataError, match=r"piip-scale\[demo\]"):
        digit_scans("train")


def test_same_arguments_same_bytes(scenes, tmp_path):
    again = write_scenes(tmp_path, **ARGUMENTS)
    names = sorted(path.name for path in scenes.images.iterdir())
    assert len(names) == 17
    assert names == sorted(path.name for path in again.images.iterdir())
    assert all((scenes.images / name).read_bytes() == (again.images / name).read_bytes() for name in names)
    assert scenes.val.read_bytes() == again.val.read_bytes()
    other = write_scenes(tmp_path / "other", **ARGUMENTS | {"seed": 8})
    assert other.train.read_bytes() != again.train.read_bytes()


def test_second_call_reuses_and_an_interrupted_one_is_redone(tmp_path):
    paths = write_scenes(tmp_path, **ARGUMENTS)
    stamp, image = tmp_path / "scenes.json", next(paths.images.iterdir())
    before = stamp.stat().st_mtime_ns
    write_scenes(tmp_path, **ARGUMENTS)
    assert stamp.stat().st_mtime_ns == before
    image.unlink()
    write_scenes(tmp_path, **ARGUMENTS)
    assert image.is_file()
    assert stamp.stat().st_mtime_ns > before
    write_scenes(tmp_path, **ARGUMENTS | {"size_px": 96})
    assert json.loads(paths.train.read_text())["images"][0]["width"] == 96


def test_boxes_and_areas_are_those_of_the_masks(scenes):
    for path in (scenes.train, scenes.val):
        found = read_coco(path, scenes.images)
        assert found.has_masks
        for image in found.images:
            assert image.annotations
            masks = [coco_mask.decode(note["segmentation"]) for note in image.annotations]
            assert np.sum(masks, axis=0).max() == 1
            for mask, note in zip(masks, image.annotations, strict=True):
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
                assert note["bbox"] == box
                assert note["area"] == mask.sum()


def test_masks_are_where_the_ink_is(scenes):
    found = read_coco(scenes.train, scenes.images)
    spreads = []
    for image in found.images:
        pixels = simplejpeg.decode_jpeg((scenes.images / image.file_name).read_bytes(), "RGB").astype(float)
        for note in image.annotations:
            inside = pixels[coco_mask.decode(note["segmentation"]).astype(bool)]
            spreads.append(np.abs(inside - np.median(inside, axis=0)).mean())
    # One colour of ink, but for JPEG and the anti-aliased rim; the photographs spread several times as far.
    assert np.median(spreads) < 15


def test_validation_shares_nothing_with_training():
    train, val = _material("train"), _material("val")
    scans = np.concatenate([train.scans, val.scans]).reshape(-1, 64)
    everything = load_digits().data.astype(np.float32)
    assert sorted(map(bytes, scans)) == sorted(map(bytes, everything))
    assert set(val.digits) == set(train.digits) == set(range(10))
    for left, right, photo in zip(train.photos, val.photos, load_sample_images().images, strict=True):
        assert np.array_equal(np.concatenate([left, right], axis=1), photo)


def test_digits_stay_visible():
    for seed in range(30):
        scene = _draw_scene(_material("train"), 96, np.random.default_rng(seed))
        assert 1 <= len(scene.digits) <= 6
        areas = np.bincount(scene.instance_map.ravel(), minlength=len(scene.digits) + 1)[1:]
        # The smallest digit drawn is 20 px tall and its strokes cover more than a tenth of its box.
        assert (areas > MIN_VISIBLE_SHARE * 20 * 4).all()


def test_senseless_arguments(tmp_path):
    with pytest.raises(DataError, match="at least 64 px"):
        write_scenes(tmp_path, **ARGUMENTS | {"size_px": 10})
