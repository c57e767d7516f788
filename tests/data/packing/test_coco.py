"""Reading and checking COCO files: each thing that can be wrong is one clear line."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from piip_scale.data.packing.coco import load_coco_json, read_coco, split_coco
from piip_scale.errors import DataError

SHARED = Path(__file__).parents[4] / "shared" / "data"


def make_set(folder: Path, change=lambda root: None, num_images: int = 3) -> tuple[Path, Path]:
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for index in range(num_images):
        (images / f"{index}.jpg").write_bytes(b"not opened by the reader")
    root = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 60} for i in range(num_images)],
        "annotations": [
            {"id": 10 + i, "image_id": i, "category_id": 3 + i % 2, "bbox": [5, 6, 20.5, 10]} for i in range(num_images)
        ],
        "categories": [{"id": 4, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    change(root)
    path = folder / "ann.json"
    path.write_text(json.dumps(root))
    return path, images


def note_with(**keys):
    return lambda root: root["annotations"][1].update(keys)


def image_with(**keys):
    return lambda root: root["images"][1].update(keys)


BAD = {
    "box outside": (note_with(bbox=[50, 6, 20, 10]), ["annotation 11", "image 1", "60 x 40", "--clip-boxes"]),
    "empty box": (note_with(bbox=[5, 6, 0, 10]), ["annotation 11", "empty box", "--clip-boxes"]),
    "broken box": (note_with(bbox=[5, 6, None, 10]), ["annotation 11", "four finite numbers"]),
    "unknown category": (note_with(category_id=9), ["annotation 11", "category id 9", "3, 4"]),
    "unknown image": (note_with(image_id=77), ["annotation 11", "image 77"]),
    "image twice": (image_with(id=0), ["image id 0 twice"]),
    "image absent": (image_with(file_name="gone.jpg"), ["gone.jpg", "image 1", "not there"]),
    "path escapes": (image_with(file_name="../up.jpg"), ["../up.jpg", "below the folder"]),
    "size below 0": (image_with(width=-1), ["image 1", "positive integers"]),
    "text id": (image_with(id="a"), ["image id 'a'", "whole numbers"]),
    "same name": (lambda root: root["categories"][0].update(name="cat"), ["category names"]),
    "no images": (lambda root: root["images"].clear(), ["has no images"]),
    "no lists": (lambda root: root.pop("annotations"), ["has no list annotations"]),
    "bad polygon": (note_with(segmentation=[[1, 2, 3]]), ["annotation 11", "3 points"]),
    "short runs": (note_with(segmentation={"size": [40, 60], "counts": [1, 2]}), ["annotation 11", "run lengths"]),
    "list for an image id": (note_with(image_id=[1]), ["annotation 11", "image [1]"]),
    "list for a category id": (note_with(category_id=[3]), ["annotation 11", "category id [3]"]),
    "box of 400 digits": (note_with(bbox=[5, 6, 10**400, 10]), ["annotation 11", "four finite numbers"]),
    "polygon of 400 digits": (note_with(segmentation=[[1, 2, 3, 4, 5, 10**400]]), ["annotation 11", "3 points"]),
    "size of 400 digits": (image_with(width=10**400), ["image 1", "positive integers"]),
    "id beyond int64": (image_with(id=2**63), [str(2**63), "whole numbers"]),
    "word for a crowd": (note_with(iscrowd="no"), ["annotation 11", "iscrowd 'no'", "0 or 1"]),
    "part has masks": (note_with(segmentation=[[5, 6, 9, 6, 9, 9]]), ["1 of 3", "is 10", "--boxes-only"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_line(tmp_path, case):
    change, fragments = BAD[case]
    with pytest.raises(DataError) as caught:
        read_coco(*make_set(tmp_path, change))
    assert "\n" not in str(caught.value)
    for fragment in [*fragments, "ann.json"]:
        assert fragment in str(caught.value)


def test_an_image_that_is_none_has_no_size_to_take(tmp_path):
    with pytest.raises(DataError, match=r"1.jpg cannot be decoded"):
        read_coco(*make_set(tmp_path, image_with(width=None)))


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "is empty"),
        ('{"images": [', "not valid JSON"),
        ("[1]", "no list"),
        ("[" * 100_000, "recursion"),
        ('{"images": %s}' % ("9" * 5000), "digits|no list"),
    ],
)
def test_file_that_is_not_coco(tmp_path, text, fragment):
    path = tmp_path / "ann.json"
    path.write_text(text)
    with pytest.raises(DataError, match=fragment):
        load_coco_json(path)
    with pytest.raises(DataError, match="is not there"):
        load_coco_json(tmp_path / "absent.json")


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path):
    path, images = make_set(tmp_path)
    plain = read_coco(path, images)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read_coco(path, images) == plain


def test_area_and_crowd_may_be_left_out(tmp_path):
    def change(root):
        root["annotations"][1].update(iscrowd=None)
        root["annotations"][2].update(iscrowd=1, area=7)

    found = read_coco(*make_set(tmp_path, change))
    told = [(image.annotations[0]["area"], image.annotations[0]["iscrowd"]) for image in found.images]
    assert told == [(205, 0), (205, 0), (7, 1)]


def test_small_overhang_is_clipped_and_counted(tmp_path, caplog, monkeypatch):
    path, images = make_set(tmp_path, note_with(bbox=[-0.5, 6, 20, 34.7]))
    monkeypatch.setattr(logging.getLogger("piip_scale"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="piip_scale"):
        found = read_coco(path, images)
    assert found.num_clipped == 1
    assert "clipped 1 boxes" in caplog.text
    assert found.images[1].annotations[0]["bbox"] == pytest.approx([0, 6, 19.5, 34])
    assert found.images[0].annotations[0]["bbox"] == [5, 6, 20.5, 10]


def test_clip_boxes_clips_and_drops(tmp_path):
    def change(root):
        for note, box in zip(root["annotations"], ([50, 6, 20, 10], [70, 6, 5, 5], [5, 5, 0, 3]), strict=True):
            note["bbox"] = box

    found = read_coco(*make_set(tmp_path, change), clip_boxes=True)
    assert (found.num_clipped, found.num_dropped) == (1, 2)
    assert found.images[0].annotations[0]["bbox"] == [50, 6, 10, 10]


@pytest.mark.parametrize("change", [note_with(id=10), lambda root: root["annotations"][1].pop("id")])
def test_ids_of_annotations_are_made_where_they_are_missing_or_double(tmp_path, change):
    found = read_coco(*make_set(tmp_path, change))
    assert [image.annotations[0]["id"] for image in found.images] == [10, 13, 12]
    assert found.num_other == {"num_renumbered": 1}


def test_labels_follow_the_classes(tmp_path):
    path, images = make_set(tmp_path)
    assert [c["name"] for c in read_coco(path, images).categories] == ["cat", "dog"]
    assert [c["id"] for c in read_coco(path, images, classes=("dog", "cat")).categories] == [4, 3]
    with pytest.raises(DataError, match="must be the classes"):
        read_coco(path, images, classes=("dog",))


def test_run_lengths_are_compressed_without_change(tmp_path):
    bitmap = np.zeros((40, 60), np.uint8)
    bitmap[3:9, 7:30] = 1
    flat = bitmap.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()

    def change(root):
        for note in root["annotations"]:
            note["segmentation"] = {"size": [40, 60], "counts": counts}

    found = read_coco(*make_set(tmp_path, change))
    assert found.has_masks
    assert np.array_equal(coco_mask.decode(found.images[0].annotations[0]["segmentation"]), bitmap)
    assert not read_coco(*make_set(tmp_path, change), boxes_only=True).has_masks


def test_split_is_a_partition_that_depends_on_the_seed(tmp_path):
    path, images = make_set(tmp_path, num_images=21)
    parts = [read_coco(part, images) for part in split_coco(path, tmp_path / "a", seed=3)]
    train, val = ({image.image_id for image in part.images} for part in parts)
    assert train | val == set(range(21))
    assert not train & val
    assert len(val) == 4
    assert sum(len(image.annotations) for part in parts for image in part.images) == 21
    again = split_coco(path, tmp_path / "b", seed=3)
    assert [p.read_bytes() for p in again] == [(tmp_path / "a" / p.name).read_bytes() for p in again]
    other = split_coco(path, tmp_path / "c", seed=4)[1]
    assert other.read_bytes() != again[1].read_bytes()
    one = make_set(tmp_path / "one", num_images=1)[0]
    with pytest.raises(DataError, match="at least two"):
        split_coco(one, tmp_path / "d")


def test_split_refuses_what_it_would_lose(tmp_path):
    path, _ = make_set(tmp_path, note_with(image_id=77))
    with pytest.raises(DataError, match="annotation 11 is of image 77"):
        split_coco(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"image folder .*absent is not there"):
        read_coco(path, tmp_path / "absent")


@pytest.mark.parametrize(("name", "num_images", "num_boxes"), [("bccd", 364, 4886), ("nuclei_dsb2018", 300, 12921)])
def test_real_sets_read(name, num_images, num_boxes):
    if not (SHARED / name).is_dir():
        pytest.skip(f"the shared data set {name} is not beside the repository")
    found = read_coco(SHARED / name / "instances_all.json", SHARED / name / "images")
    assert len(found.images) == num_images
    assert sum(len(image.annotations) for image in found.images) == num_boxes
    assert found.has_masks == (name != "bccd")
    assert found.num_clipped == 0
