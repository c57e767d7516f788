"""COCO files as other tools write them: taken where nothing is ambiguous, else refused in a line."""

import gzip
import json
import logging
import unicodedata

import numpy as np
import pytest
from image_files import encoded
from made_sets import write_jpeg

from piip_scale.data.packing import coco_file
from piip_scale.data.packing.coco import read_coco
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.reading.shards import ShardSet
from piip_scale.errors import DataError


def root_of(**image):
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48} | image],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 3, "bbox": [8, 8, 20, 16], "area": 320}],
        "categories": [{"id": 3, "name": "cat"}],
    }


def write(folder, root, file="a.jpg", encode=lambda text: text.encode()):
    write_jpeg(folder / "images" / file, 48, 64, 0)
    (folder / "ann.json").write_bytes(encode(json.dumps(root)))
    return folder / "ann.json", folder / "images"


def only_image(files, **options):
    (image,) = read_coco(*files, **options).images
    return image


def note_with(**keys):
    root = root_of()
    root["annotations"][0] |= keys
    return root


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("train\\a.jpg", "train/a.jpg"),
        ("my%20photo.jpg", "my photo.jpg"),
        ("train%5Ca.jpg", "train%5Ca.jpg"),
        ("./train//a.jpg", "train/a.jpg"),
        (unicodedata.normalize("NFC", "café/é.jpg"), unicodedata.normalize("NFD", "café/é.jpg")),
        (unicodedata.normalize("NFD", "café.jpg"), unicodedata.normalize("NFC", "café.jpg")),
        ("a.JPG", "a.jpg"),
        ("Train/A.jpg", "train/a.jpg"),
    ],
)
def test_an_image_is_found_as_systems_and_tools_spell_its_name(tmp_path, name, file):
    image = only_image(write(tmp_path, root_of(file_name=name), file))
    assert image.file_name == file
    assert image.file_bytes == (tmp_path / "images" / file).stat().st_size


def test_a_name_that_several_files_could_have_is_none(tmp_path):
    files = write(tmp_path, root_of(file_name="A.jpg"))
    write_jpeg(tmp_path / "images" / "a.JPG", 48, 64, 0)
    with pytest.raises(DataError, match=r"A\.jpg.*must lie in the image folder"):
        read_coco(*files)


@pytest.mark.parametrize(
    "name", ["%2e%2e/b.jpg", "..\\b.jpg", "a\0.jpg", "a\n.jpg", "\ud800.jpg", "", None, 7, ["a.jpg"], "/b.jpg"]
)
def test_a_name_never_leaves_the_folder_and_never_breaks_a_line(tmp_path, name):
    write_jpeg(tmp_path / "b.jpg", 48, 64, 0)
    with pytest.raises(DataError) as caught:
        read_coco(*write(tmp_path, root_of(file_name=name)))
    assert str(caught.value).isprintable()


def test_a_pipe_of_an_images_name_is_not_waited_for(tmp_path):
    import os

    files = write(tmp_path, root_of(file_name="p.jpg"))
    os.mkfifo(tmp_path / "images" / "p.jpg")
    with pytest.raises(DataError, match="is not there"):
        read_coco(*files)


def test_lvis_names_files_by_their_address(tmp_path):
    root = root_of(coco_url="http://images.example.org/train2017/a.jpg")
    del root["images"][0]["file_name"]
    assert only_image(write(tmp_path / "flat", root)).file_name == "a.jpg"
    assert only_image(write(tmp_path / "deep", root, "train2017/a.jpg")).file_name == "train2017/a.jpg"


@pytest.mark.parametrize("as_written", [str, float, lambda number: f" {number} "])
def test_ids_and_sizes_may_be_text_or_floats(tmp_path, as_written):
    root = root_of(id=as_written(1), width=as_written(64), height=as_written(48))
    root["annotations"][0] |= {"id": as_written(5), "image_id": as_written(1), "category_id": as_written(3)}
    root["categories"][0]["id"] = as_written(3)
    image = only_image(write(tmp_path, root))
    assert (image.image_id, image.height_px, image.width_px) == (1, 48, 64)
    assert (image.annotations[0]["id"], image.annotations[0]["category_id"]) == (5, 3)


MISSING = [None, 0, 0.0, "", "0", float("nan")]


@pytest.mark.parametrize("absent", MISSING)
@pytest.mark.parametrize("sides", [("width", "height"), ("width",), ("height",)])
def test_sizes_that_are_not_stated_are_the_images(tmp_path, caplog, absent, sides):
    files = write(tmp_path, root_of(**dict.fromkeys(sides, absent)))
    with caplog.at_level(logging.WARNING):
        image = only_image(files)
    assert (image.height_px, image.width_px) == (48, 64)
    assert "took the sizes of 1 images from their files" in caplog.text
    assert read_coco(*files).num_other == {"num_sized": 1}


def test_a_side_that_is_stated_must_be_the_files(tmp_path):
    root = root_of(width=63)
    del root["images"][0]["height"]
    with pytest.raises(
        DataError, match=r"image 1 has height, width \(None, 63\); its file is 64 px wide and 48 px high"
    ):
        read_coco(*write(tmp_path, root))


def test_one_side_decides_an_orientation(tmp_path):
    files = write(tmp_path, root_of())
    (files[1] / "a.jpg").write_bytes(encoded(np.zeros((48, 64, 3), np.uint8), "JPEG", orientation=6))
    for side, size_px in (("width", (64, 48)), ("height", (48, 64))):
        root = root_of(width=None, height=None)
        root["images"][0][side] = 48
        files[0].write_text(json.dumps(root))
        image = only_image(files)
        assert (image.height_px, image.width_px) == size_px


def test_the_limit_of_pixels_holds_where_sizes_are_read(tmp_path):
    files = write(tmp_path, root_of(width=None))
    with pytest.raises(DataError, match="raise --max-pixels"):
        read_coco(*files, max_pixels=3000)
    with pytest.raises(DataError, match="raise --max-pixels"):
        pack_coco(*files, tmp_path / "out", max_pixels=3000)


@pytest.mark.parametrize(("flag", "value"), [("0", 0), ("1", 1), (0.0, 0), (True, 1), (None, 0)])
def test_flags_may_be_text_or_floats(tmp_path, flag, value):
    (note,) = only_image(write(tmp_path, note_with(iscrowd=flag))).annotations
    assert note["iscrowd"] == value


def test_a_box_is_its_masks_where_none_is_stated(tmp_path):
    root = note_with(segmentation=[[10, 10, 30, 10, 30, 25]])
    del root["annotations"][0]["bbox"]
    files = write(tmp_path, root)
    assert only_image(files).annotations[0]["bbox"] == [10, 10, 20, 15]
    assert only_image(files, boxes_only=True).annotations[0]["bbox"] == [10, 10, 20, 15]


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: gzip.compress(text.encode()),
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-32"),
    ],
)
def test_a_file_may_be_packed_or_in_another_encoding(tmp_path, encode):
    assert only_image(write(tmp_path, root_of(), encode=encode)).image_id == 1


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda text: gzip.compress(text.encode())[:-9], "is damaged"),
        (lambda text: gzip.compress(b" " * 40_000_000, 1), "unpacks without end"),
        (lambda text: b"PK\x03\x04" + text.encode(), "zip archive"),
        (lambda text: text.replace("cat", "caf\xe9").encode("latin-1"), "cannot be read"),
        (lambda text: (text[:-1] + ', "images": []}').encode(), "the key 'images' twice"),
        (lambda text: text.replace('"bbox"', '"bbox": [1, 1, 2, 2], "bbox"').encode(), "the key 'bbox' twice"),
    ],
)
def test_a_file_that_cannot_be_meant_as_it_is_written_is_refused(tmp_path, monkeypatch, encode, message):
    monkeypatch.setattr(coco_file, "_MOST_UNPACKED", 1_000_000)
    with pytest.raises(DataError, match=message) as caught:
        read_coco(*write(tmp_path, root_of(), encode=encode))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("keys", [{"ignore": 1}, {"ignore": True}, {"area": 0}, {"area": -3.5}, {"iscrowd": 1}])
def test_what_mmdet_leaves_out_is_ignored(tmp_path, keys):
    note = only_image(write(tmp_path, note_with(**keys))).annotations[0]
    assert (note["iscrowd"], note["area"]) == (1, 320)


def test_a_flag_that_is_neither_is_refused(tmp_path):
    with pytest.raises(DataError, match="ignore 'yes'"):
        read_coco(*write(tmp_path, note_with(ignore="yes")))


def with_dog(used):
    root = root_of()
    root["categories"].append({"id": 4, "name": "dog"})
    if used:
        root["annotations"].append({"id": 6, "image_id": 1, "category_id": 4, "bbox": [1, 1, 9, 9]})
    return root


def test_a_subset_of_classes_leaves_others_out(tmp_path):
    files = write(tmp_path, with_dog(used=True))
    found = read_coco(*files, classes=["dog"], subset=True)
    assert [category["name"] for category in found.categories] == ["dog"]
    assert [note["category_id"] for note in found.images[0].annotations] == [4]
    assert found.num_other == {"num_others": 1}
    assert [c["name"] for c in read_coco(*files, classes=["dog,cat"], subset=True).categories] == ["dog", "cat"]
    with pytest.raises(DataError, match="must be the classes"):
        read_coco(*files, classes=["dog"])
    with pytest.raises(DataError, match="--class cow"):
        read_coco(*files, classes=["cow"], subset=True)


def test_unused_categories_stay_unless_asked_or_in_the_way(tmp_path):
    files = write(tmp_path, with_dog(used=False))
    assert len(read_coco(*files).categories) == 2
    assert [c["name"] for c in read_coco(*files, drop_unused=True).categories] == ["cat"]
    root = root_of()
    root["categories"].append({"id": 0, "name": "cat", "supercategory": "none"})
    assert [c["id"] for c in read_coco(*write(tmp_path, root)).categories] == [3]


def test_one_file_under_two_ids_is_told(tmp_path):
    root = root_of()
    root["images"].append(root["images"][0] | {"id": 2, "file_name": "./a.jpg"})
    with pytest.raises(DataError, match=r"images 1, 2 are one file, a\.jpg"):
        read_coco(*write(tmp_path, root))


@pytest.mark.parametrize("suffix", [".json", ".seg", "." + "x" * 130, ".tar.gz", ".J P G", ""])
def test_a_members_name_does_not_follow_the_files(tmp_path, suffix):
    pack_coco(*write(tmp_path, root_of(file_name=f"photo{suffix}"), f"photo{suffix}"), tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out")
    assert shards.read(0).image == (tmp_path / "images" / f"photo{suffix}").read_bytes()
    assert shards.notes(0)["file_name"] == f"photo{suffix}"
    import tarfile

    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        image, notes = tar.getnames()
    assert notes == "000000000001.json"
    assert image in ("000000000001.img", "000000000001.gz")


@pytest.mark.parametrize(
    "polygon", [[100, 100, 120, 100, 120, 120], [5, 5, 40, 5, 5, 5], [40, 30, 60, 30, 60, 45]], ids=str
)
def test_a_mask_that_does_not_reach_into_its_box_is_no_target(tmp_path, polygon):
    files = write(tmp_path, note_with(bbox=[0, 0, 20, 20], segmentation=[polygon]))
    with pytest.raises(DataError, match="does not reach into its box"):
        read_coco(*files)
    assert not read_coco(*files, boxes_only=True).has_masks
