"""What packing decides of an image's orientation is what training, evaluation and verification see."""

import json

import numpy as np
import PIL.Image
import pytest
from image_files import encoded

from piip_scale.data.images import decode_image
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.packing.pack_classes import pack_folders
from piip_scale.data.packing.pack_maps import pack_label_maps
from piip_scale.data.packing.packing import PackOptions
from piip_scale.data.packing.verify import verify_shards
from piip_scale.data.reading.decoding import decode_labelled, decode_sample
from piip_scale.data.reading.label_maps import decode_mapped
from piip_scale.data.reading.shards import ShardSet

ORIENTATIONS = (1, 3, 6, 8)
HEIGHT, WIDTH = 16, 24


def photo(number):
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([rows * 15, columns * 10, np.full_like(rows, 40 * number)], -1).astype(np.uint8)


def write_photos(folder):
    folder.mkdir(parents=True)
    for number, orientation in enumerate(ORIENTATIONS):
        content = encoded(photo(number), "JPEG", orientation=orientation, quality=95)
        (folder / f"{number}.jpg").write_bytes(content)
    return folder


def wanted(folder, number, *, apply):
    content = (folder / f"{number}.jpg").read_bytes()
    return decode_image(content, "x", orientation=ORIENTATIONS[number] if apply else 1)


def size_of(number, *, apply):
    return (WIDTH, HEIGHT) if apply and ORIENTATIONS[number] > 4 else (HEIGHT, WIDTH)


@pytest.mark.parametrize(("exif", "apply"), [("apply", True), ("stored", False), ("auto", True), ("auto", False)])
def test_boxes_lie_on_the_image_that_their_sizes_mean(tmp_path, exif, apply):
    images = write_photos(tmp_path / "images")
    # Half a turn changes no size, so that sizes alone cannot decide it.
    numbers = [number for number in range(4) if exif != "auto" or apply or ORIENTATIONS[number] != 3]
    entries, notes = [], []
    for number in numbers:
        height, width = size_of(number, apply=apply)
        entries.append({"id": number, "file_name": f"{number}.jpg", "height": height, "width": width})
        box = [1, 2, width - 3, height - 4]
        notes.append({"id": number, "image_id": number, "category_id": 1, "bbox": box, "iscrowd": 0})
    root = {"images": entries, "annotations": notes, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "ann.json").write_text(json.dumps(root))
    pack_coco(tmp_path / "ann.json", images, tmp_path / "set", how=PackOptions(exif=exif, workers=1))
    shards = ShardSet.open(tmp_path / "set")
    for number, image in enumerate(numbers):
        sample = decode_sample(shards.read(number), shards.label_of_category, has_masks=False)
        assert np.array_equal(sample.pixels, wanted(images, image, apply=apply))
        assert tuple(shards.sizes_px[number]) == sample.pixels.shape[:2] == size_of(image, apply=apply)
    assert not verify_shards(tmp_path / "set", workers=1).problems


@pytest.mark.parametrize(("exif", "apply"), [("auto", True), ("stored", False)])
def test_photographs_of_classes_are_seen_as_prediction_sees_them(tmp_path, exif, apply):
    images = write_photos(tmp_path / "images" / "cat")
    pack_folders(tmp_path / "images", tmp_path / "set", how=PackOptions(exif=exif, workers=1))
    shards = ShardSet.open(tmp_path / "set")
    for index in range(len(shards)):
        sample = decode_labelled(shards.read(index), 1)
        number = int(shards.notes(index)["file_name"].split("/")[1][0])
        assert np.array_equal(sample.pixels, wanted(images, number, apply=apply))
    assert not verify_shards(tmp_path / "set", workers=1).problems


@pytest.mark.parametrize("apply", [True, False])
def test_label_maps_lie_on_the_image_of_their_size(tmp_path, apply):
    images, maps = write_photos(tmp_path / "images"), tmp_path / "maps"
    maps.mkdir()
    for number in range(4):
        labels = np.zeros(size_of(number, apply=apply), np.uint8)
        labels[:2] = 1
        PIL.Image.fromarray(labels).save(maps / f"{number}.png")
    how = PackOptions(exif="auto" if apply else "stored", workers=1)
    pack_label_maps(images, maps, tmp_path / "set", classes=("a", "b"), how=how)
    shards = ShardSet.open(tmp_path / "set")
    for index in range(len(shards)):
        sample = decode_mapped(shards.read(index), shards.map_rule)
        number = int(shards.notes(index)["file_name"][0])
        assert np.array_equal(sample.pixels, wanted(images, number, apply=apply))
        assert sample.labels.shape == sample.pixels.shape[:2]
        assert sample.labels[:2].all()
    assert not verify_shards(tmp_path / "set", workers=1).problems
