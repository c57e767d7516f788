"""Errors by kind, by the definitions, one by one: of boxes and of masks, in crowds, and of classes nobody labelled."""

import numpy as np
import pycocotools.mask as coco_mask
import pytest

from piip_scale.tasks.cases import best_and_worst
from piip_scale.tasks.detection.cases import detection_cases
from piip_scale.tasks.detection.error_kinds import KINDS, error_kinds

SIDE = 100
CAT, DOG = 1, 2
CATEGORIES = [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}]


def shape(left, width, part):
    box = [float(left), 10.0, float(width), 20.0]
    if part == "box":
        return {"bbox": box}
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[10:30, left : left + width] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"bbox": box, "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}


def kinds_of(objects, found, part="box", **image):
    """The kinds of errors: of objects (class, left, width[, crowd]) and detections (class, left, width, score)."""
    notes = [
        {"id": n, "image_id": 1, "category_id": c, "iscrowd": int(bool(crowd)), "area": 1.0, **shape(x, w, part)}
        for n, (c, x, w, *crowd) in enumerate(objects, 1)
    ]
    results = [{"image_id": 1, "category_id": c, "score": s, **shape(x, w, part)} for c, x, w, s in found]
    truth = {"images": [{"id": 1, "height": SIDE, "width": SIDE, **image}], "annotations": notes}
    return error_kinds(truth, results, part, 100)


@pytest.mark.parametrize("part", ["box", "mask"])
@pytest.mark.parametrize(
    ("objects", "found", "kinds"),
    [
        ([(CAT, 10, 20)], [(CAT, 10, 20, 0.9)], []),
        ([(CAT, 10, 20)], [(DOG, 10, 20, 0.9)], ["classification"]),
        # Half of it: an IoU of a third.
        ([(CAT, 10, 20)], [(CAT, 20, 20, 0.9)], ["localisation"]),
        ([(CAT, 10, 20)], [(DOG, 20, 20, 0.9)], ["both", "missed"]),
        ([(CAT, 10, 20)], [(CAT, 10, 20, 0.9), (CAT, 11, 20, 0.8)], ["duplicate"]),
        ([(CAT, 10, 20)], [(CAT, 60, 20, 0.9)], ["background", "missed"]),
        ([(CAT, 10, 20)], [], ["missed"]),
        ([], [(CAT, 10, 20, 0.9)], ["background"]),
        # The better one has it, whatever their order; the other is badly on it.
        ([(CAT, 10, 20)], [(CAT, 20, 20, 0.5), (CAT, 10, 20, 0.9)], ["localisation"]),
        # Of its own class badly counts before of another class well.
        ([(CAT, 10, 20), (DOG, 20, 20)], [(CAT, 21, 20, 0.9)], ["localisation", "missed"]),
        # In a crowd of its class is no error; a crowd is no object.
        ([(CAT, 10, 60, True)], [(CAT, 20, 20, 0.9)], []),
        ([(CAT, 10, 60, True)], [(DOG, 20, 20, 0.9)], ["background"]),
    ],
)
def test_each_kind_is_what_it_is_defined_as(objects, found, kinds, part):
    counts = kinds_of(objects, found, part).counts
    assert counts == {kind: kinds.count(kind) for kind in KINDS}


def test_mending_gives_an_object_to_its_best_claimant_alone():
    found = kinds_of([(CAT, 10, 20)], [(CAT, 20, 20, 0.9), (CAT, 0, 20, 0.8)])
    assert found.counts["localisation"] == 2
    assert (found.ap50, found.costs["localisation"]) == (0.0, 1.0)
    # Moved to the class of the object, and so no longer a false one of its own.
    moved = kinds_of([(CAT, 10, 20), (DOG, 50, 20)], [(DOG, 10, 20, 0.9), (DOG, 50, 20, 0.8)])
    assert (moved.ap50, moved.costs["classification"]) == (0.25, 0.75)
    assert moved.costs["background"] == 0.0


def test_a_class_that_nobody_labelled_is_no_error():
    image = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    assert kinds_of([(CAT, 10, 20)], [(DOG, 60, 20, 0.9)], **image).counts["background"] == 0
    assert (
        kinds_of([(CAT, 10, 20)], [(DOG, 60, 20, 0.9)], neg_category_ids=[DOG], not_exhaustive_category_ids=[]).counts[
            "background"
        ]
        == 1
    )


def test_the_best_and_the_worst_images_are_told_apart():
    tallies = []
    for image_id, (right, wrong, missed) in enumerate(
        [(2, 0, 0), (0, 0, 0), (0, 3, 1), (1, 1, 0), (4, 0, 0), (0, 0, 1)]
    ):
        tally = kinds_of([], []).tallies[0]
        tallies.append(type(tally)(image_id, right, wrong, missed))
    best, worst = best_and_worst(detection_cases(tallies, [], CATEGORIES))
    # The second has nothing to find and nothing found.
    assert [case.image_id for case in best] == [4, 0, 3]
    assert [case.image_id for case in worst] == [2, 5]
    assert worst[0].words == "0 right, 3 wrong, 1 missed; F1 0.00"
