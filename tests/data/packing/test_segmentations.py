"""Masks before any foreign code sees them: what is whole passes unchanged, everything else is refused."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from piip_scale.data.augment.masks import decode_run_lengths
from piip_scale.data.reading.mask_checks import box_of, check_run_lengths, checked_segmentation, run_lengths
from piip_scale.errors import DataError

HEIGHT, WIDTH = 48, 64
NUM_PIXELS = HEIGHT * WIDTH


def bitmaps():
    rng = np.random.default_rng(0)
    for number in range(60):
        height, width = rng.integers(1, 90, 2)
        bitmap = rng.random((height, width)) < rng.random()
        if number % 3 == 0:
            bitmap[:] = number % 2
        if number % 4 == 0:
            bitmap = np.kron(bitmap[:9], np.ones((7, 13), bool))
        yield np.asfortranarray(bitmap, np.uint8)


def test_what_pycocotools_packs_unpacks_to_the_same_pixels():
    for bitmap in bitmaps():
        packed = coco_mask.encode(bitmap)
        numbers = run_lengths(packed["counts"])
        pixels = np.repeat(np.arange(len(numbers)) % 2, numbers)
        np.testing.assert_array_equal(pixels, bitmap.ravel(order="F"))
        check_run_lengths({"size": list(packed["size"]), "counts": packed["counts"].decode()})


BAD_RUNS = {
    "half of the mask": "0P`1",
    "a mask and more": "0P`1P`1P`1",
    "empty": "",
    "cut off": "o",
    "no end": "oooooooo",
    "a number of 40 characters": "o" * 40 + "0",
    "below 0": "O",
    "other letters": "é",
    "zero bytes": "\0\1",
    "no text": 7,
    "nothing": None,
    "a list in a list": [[1]],
    "sum too small": [1, 2],
    "sum too large": [NUM_PIXELS, 1],
    "negative": [-1, NUM_PIXELS + 1],
    "parts of pixels": [0.5, NUM_PIXELS - 0.5],
    "truths": [True] * 3,
    "no numbers": [],
    "texts": [str(NUM_PIXELS)],
    "400 digits": [10**400],
}


@pytest.mark.parametrize("counts", BAD_RUNS.values(), ids=BAD_RUNS)
def test_run_lengths_that_do_not_fill_the_image_are_refused(counts):
    segmentation = {"size": [HEIGHT, WIDTH], "counts": counts}
    with pytest.raises(ValueError, match="run lengths"):
        checked_segmentation(segmentation, HEIGHT, WIDTH)
    if not isinstance(counts, list):
        with pytest.raises(DataError, match="run lengths"):
            decode_run_lengths(segmentation)


@pytest.mark.parametrize("size", [None, [WIDTH, HEIGHT], [HEIGHT], "48,64", [HEIGHT, -WIDTH], [10**9, 10**9], [0, 0]])
def test_run_lengths_of_another_size_are_refused(size):
    whole = coco_mask.encode(np.ones((HEIGHT, WIDTH), np.uint8, order="F"))["counts"].decode()
    with pytest.raises(ValueError, match="size"):
        checked_segmentation({"size": size, "counts": whole}, HEIGHT, WIDTH)
    if size != [WIDTH, HEIGHT]:
        with pytest.raises(DataError):
            decode_run_lengths({"size": size, "counts": whole})


def test_numbers_written_as_floats_are_numbers():
    made = checked_segmentation({"size": [48.0, 64.0], "counts": [1000.0, 72.0, 2000.0]}, HEIGHT, WIDTH)
    assert made["size"] == [HEIGHT, WIDTH]
    assert run_lengths(made["counts"]).tolist() == [1000, 72, 2000]


@pytest.mark.parametrize("value", [None, [], [[]], [[], []]])
def test_nothing_is_no_mask(value):
    assert checked_segmentation(value, HEIGHT, WIDTH) is None


def test_parts_that_are_no_polygons_are_left_out_and_others_stay_as_they_are():
    whole = [10, 10, 30.5, 10, 30, 30]
    assert checked_segmentation([whole, [1, 1, 2, 2], []], HEIGHT, WIDTH) == [whole]
    for alone in (
        [1, 1, 2, 2],
        [1, 2, 3, 4, 5, 6, 7],
        [1, 1, 1e9, 1, 1e9, 1e9],
        [1, 1, float("nan"), 3, 4, 4],
        [1, 1, "2", 3, 4, 4],
    ):
        with pytest.raises(ValueError, match="3 points"):
            checked_segmentation([alone], HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="neither polygons"):
        checked_segmentation("polygon", HEIGHT, WIDTH)


def test_the_box_of_a_mask():
    assert box_of([[10, 10, 30, 10, 30, 25], [5, 12, 8, 12, 8, 14]]) == [5, 10, 25, 15]
    bitmap = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    bitmap[3:9, 7:30] = 1
    packed = coco_mask.encode(bitmap)
    assert box_of({"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()}) == [7, 3, 23, 6]
    assert box_of(checked_segmentation({"size": [HEIGHT, WIDTH], "counts": [NUM_PIXELS]}, HEIGHT, WIDTH)) is None
