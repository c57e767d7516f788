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


def pack_boxes(tmp_path, orientations, sizes, **options):
    """A COCO set of photographs of such orientations, and of such sizes in its annotations."""
    folder = tmp_path / "images"
    folder.mkdir(parents=True)
    entries = []
    for number, (orientation, size_px) in enumerate(zip(orientations, sizes, strict=True)):
        pixels = photo(number)[:16, :16] if size_px == (16, 16) else photo(number)
        content = encoded(pixels, "JPEG", orientation=orientation, quality=95)
        (folder / f"{number}.jpg").write_bytes(content)
        height, width = size_px
        entries.append({"id": number, "file_name": f"{number}.jpg", "height": height, "width": width})
    notes = [
        {"id": number, "image_id": number, "category_id": 1, "bbox": [1, 2, 3, 4]} for number in range(len(entries))
    ]
    root = {"images": entries, "annotations": notes, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "ann.json").write_text(json.dumps(root))
    how = PackOptions(workers=1, **options)
    manifest = pack_coco(tmp_path / "ann.json", folder, tmp_path / "set", how=how)
    shards = ShardSet.open(tmp_path / "set")
    return [shards.read(number).orientation for number in range(len(shards))], manifest.made_with


STORED, TURNED, SQUARE = (HEIGHT, WIDTH), (WIDTH, HEIGHT), (16, 16)


@pytest.mark.parametrize(
    ("sizes", "orientations", "expected", "guessed", "message"),
    [
        (
            [STORED, STORED, SQUARE],
            (6, 3, 8),
            [1, 1, 1],
            False,
            "1 as stored, 2 fit both by their size and stay as they are stored, as the others",
        ),
        (
            [TURNED, STORED, SQUARE],
            (6, 3, 8),
            [6, 3, 8],
            False,
            "1 are annotated as turned, 2 fit both by their size and are turned, as the others",
        ),
        (
            [STORED, STORED, SQUARE],
            (1, 3, 8),
            [1, 3, 8],
            True,
            "2 fit both by their size and are turned; --exif apply or stored",
        ),
        (
            [STORED, TURNED, SQUARE],
            (6, 8, 3),
            [1, 8, 3],
            True,
            "1 are annotated as turned, 1 as stored, 1 fit both by their size and are turned; --exif",
        ),
        ([(None, None), STORED, SQUARE], (6, 8, 3), [1, 1, 1], False, "1 as stored, 2 fit both"),
        ([(None, None), TURNED, SQUARE], (6, 8, 3), [6, 8, 3], False, "1 are annotated as turned, 2 fit both"),
    ],
)
def test_a_set_has_one_view_where_sizes_do_not_decide(
    tmp_path, caplog, sizes, orientations, expected, guessed, message
):
    found, made_with = pack_boxes(tmp_path, orientations, sizes)
    assert found == expected
    assert message in caplog.text
    assert made_with.get("undecided") == ("stored" if expected[1] == 1 else None)
    guesses = [line for line in caplog.messages if "are its annotations of that view?" in line]
    assert bool(guesses) == (
        made_with.get("undecided") is None and "as the others" not in caplog.text and 6 not in found
    )


def test_a_set_without_orientations_is_not_spoken_of(tmp_path, caplog):
    found, made_with = pack_boxes(tmp_path, (1, 1), [STORED, STORED])
    assert (found, "undecided" in made_with, caplog.messages) == ([1, 1], False, [])


def test_label_maps_of_stored_views_decide_for_those_of_half_turns(tmp_path):
    images, maps = write_photos(tmp_path / "images"), tmp_path / "maps"
    maps.mkdir()
    for number in range(4):
        PIL.Image.new("L", (WIDTH, HEIGHT), number % 2).save(maps / f"{number}.png")
    pack_label_maps(images, maps, tmp_path / "set", classes=("a", "b"), how=PackOptions(workers=1))
    shards = ShardSet.open(tmp_path / "set")
    assert [shards.read(number).orientation for number in range(4)] == [1] * 4
