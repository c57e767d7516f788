"""An evaluation's page, of each task: its numbers, its mistakes, its best and worst images, in a browser."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from browser import needs_browser, shown
from made_sets import make_coco, make_maps, write_jpeg

from piip_scale.data.batch import ClassificationBatch, ImageInfo, SegmentationBatch
from piip_scale.data.packing.pack import coco_source
from piip_scale.data.packing.pack_classes import folder_source
from piip_scale.data.packing.pack_maps import label_map_source
from piip_scale.data.packing.packing import PackOptions
from piip_scale.data.packing.unpacked import UnpackedSet
from piip_scale.data.reading.label_maps import decode_mapped
from piip_scale.tasks.base import Segmentation
from piip_scale.tasks.cases import drawn_cases
from piip_scale.tasks.classification.metric import AccuracyMetric
from piip_scale.tasks.classification.model import Classification
from piip_scale.tasks.detection.metric import CocoMetric
from piip_scale.tasks.evaluation_page import Evaluated, evaluation_page
from piip_scale.tasks.metric_words import measure_of, title_of, words_of
from piip_scale.tasks.segmentation.cases import image_iou, keep
from piip_scale.tasks.segmentation.metric import SegmentationMetric

HOW = PackOptions()
EVIL = "<script>ran=1</script>"


def page_of(metrics, report, samples=None):
    best, worst = drawn_cases(report, samples) if samples else ((), ())
    return evaluation_page(Evaluated(metrics, report, f"a run {EVIL}", best, worst))


@pytest.fixture(scope="module")
def detection(tmp_path_factory):
    path, images = make_coco(tmp_path_factory.mktemp("coco"), 8)
    samples = UnpackedSet(coco_source(path, images, how=HOW), HOW, "detection", "val")
    truth = samples.coco_ground_truth()
    truth["categories"][0]["name"] += EVIL
    metric = CocoMetric(truth, with_masks=True)
    keys = ("image_id", "category_id", "bbox", "segmentation")
    found = [{key: note[key] for key in keys} | {"score": 0.9} for note in metric.truth["annotations"]]
    first, _missed, *rest = [metric.checked_result(entry | {"segmentation": _rle(entry, truth)}) for entry in found]
    # One taken for the other class, one missed, one of nothing.
    wrong = {"category_id": 2 if first["category_id"] == 7 else 7}
    nothing = rest[-1] | {"bbox": [0.0, 0.0, 3.0, 3.0], "score": 0.5}
    results = [first | wrong, *rest, nothing]
    return page_of(metric.score_results(results), metric.report_results(results), samples)


def _rle(entry, truth):
    from piip_scale.tasks.detection.sample_picture import run_lengths

    image = next(image for image in truth["images"] if image["id"] == entry["image_id"])
    rle = run_lengths(entry["segmentation"], (image["height"], image["width"]))
    return rle | {"counts": rle["counts"].decode()}


@needs_browser
def test_a_detectors_page_is_read_on_a_desk_and_on_a_phone(detection, tmp_path):
    for frame in shown(detection, tmp_path, dark=True):
        words = frame["words"]
        assert "AP small\n\tbox\tmask\n" in words
        assert "average precision, mean over IoU of 0.50 to 0.95" in words
        assert "-1 is no score" in words
        assert "Errors by kind (box)" in words
        assert "Errors by kind (mask)" in words
        rows = dict(re.findall(r"^(classification|missed|localisation)\t(\d+)", words, re.MULTILINE))
        assert rows["classification"] == "1"
        assert int(rows["missed"]) >= 1
        assert re.search(r"taken for another class\s+1\s+\d+% of \d+ objects", words)
        assert f"b{EVIL}" in words
        assert len(frame["charts"]) == 2
        # Truth and prediction of each of the images that hold anything.
        assert len(frame["images"]) == 12
        assert min(frame["images"]) > 100
        assert "F1 1.00" in words
        names, objects, *_scores = frame["sorted"]
        assert names == sorted(names)
        assert list(map(int, objects)) == sorted(map(int, objects), reverse=True)


def info(samples, number):
    notes, size = samples.notes(number), (40, 56)
    return ImageInfo(samples.keys[number], notes["image_id"], size, size, (1.0, 1.0))


def test_a_segmentors_page_has_its_best_and_worst_maps(tmp_path):
    images, maps = make_maps(tmp_path, count=16)
    names = ("sky", "tree", "road", "sea")
    samples = UnpackedSet(label_map_source(images, maps, classes=names, how=HOW), HOW, "segmentation", "val")
    metric, scores = SegmentationMetric(names), {}
    for number in range(len(samples)):
        truth = torch.from_numpy(decode_mapped(samples.read(number), samples.map_rule).labels.copy())
        found = truth.clone()
        found[truth == 255] = 0
        # The higher its number, the more of an image is wrong.
        found[:, : 3 * int(samples.keys[number])] = 1
        size = tuple(truth.shape)
        notes = samples.notes(number)
        one = ImageInfo(samples.keys[number], notes["image_id"], size, size, (1.0, 1.0))
        batch = SegmentationBatch(torch.zeros(1, *size, 3, dtype=torch.uint8), (one,), truth[None])
        metric.update(batch, [Segmentation(notes["image_id"], found)])
        alone = SegmentationMetric(names)
        alone.update(batch, [Segmentation(notes["image_id"], found)])
        scores[int(samples.keys[number])] = alone.compute()["miou"]
    report = metric.report()
    assert len(report.cases) == 12
    best, worst = drawn_cases(report, samples)
    ranked = sorted(scores, key=scores.get)
    assert [int(case.key) for case in best] == ranked[::-1][:6]
    assert [int(case.key) for case in worst] == ranked[:6]
    assert "mean IoU 1.000" in best[0].words
    text = page_of(metric.compute(), report, samples).decode()
    assert "mean over classes of intersection over union" in text
    assert text.count("<img") == 24
    assert "sky" in text


def test_a_classifiers_page_tells_what_it_is_sure_of_and_wrong_in(tmp_path):
    names = [f"class {number}" for number in range(7)]
    for number, name in enumerate(names):
        for place in range(2):
            write_jpeg(tmp_path / name / f"{place}.jpg", 40, 56, 2 * number + place)
    samples = UnpackedSet(folder_source(tmp_path, classes=names, how=HOW), HOW, "classification", "val")
    metric, labels = AccuracyMetric(names), [samples.notes(number)["label"] for number in range(len(samples))]
    for number, label in enumerate(labels):
        # Class 2 is taken for class 3, ever more surely.
        guess = 3 if label == 2 else label
        guesses = torch.tensor([guess, *[k for k in range(7) if k not in (guess, label)][:3], label][:5])
        chances = torch.tensor([0.5 + number / 50, 0.1, 0.1, 0.1, 0.05])
        one = info(samples, number)
        batch = ClassificationBatch(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), (one,), torch.tensor([label]))
        metric.update(batch, [Classification(one.image_id, guesses, chances)])
    report = metric.report()
    best, worst = drawn_cases(report, samples)
    surest = {label == 2: 0.5 + number / 50 for number, label in enumerate(labels)}
    assert worst[0].words == f"class 2, taken for class 3 ({surest[True]:.2f})"
    assert best[0].words == f"right ({surest[False]:.2f})"
    text = page_of(metric.compute(), report, samples).decode()
    for told in ("first guess is right", "class 2</th><td>class 3</td><td>2", "top-5 accuracy", "among the first five"):
        assert told in text
    assert report.columns["top5_accuracy"] == [1.0] * 7


def test_maps_of_few_images_are_kept_whatever_their_number():
    kept = {}
    for image_id, score in enumerate(np.random.default_rng(0).permutation(50) / 50):
        keep(kept, Segmentation(image_id, torch.full((2, 3), image_id, dtype=torch.uint8)), float(score))
    scores = sorted(round(one.score * 50) for one in kept.values())
    assert scores == [0, 1, 2, 3, 4, 5, 44, 45, 46, 47, 48, 49]
    assert all((one.labels_HW() == image_id).all() for image_id, one in kept.items())
    keep(kept, Segmentation(99, torch.zeros(2, 3, dtype=torch.uint8)), float("nan"))
    assert 99 not in kept


def test_an_images_iou_is_that_of_its_classes():
    truth, found = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    cells, numbers = np.unique(truth * 5 + found, return_counts=True)
    assert image_iou(cells, numbers, 5) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert np.isnan(image_iou(cells[:0], numbers[:0], 5))


def test_every_metric_has_words():
    titles = {
        "box_ap": "box AP",
        "mask_ap50": "mask AP50",
        "box_ar300": "box AR300",
        "mask_ar_s": "mask AR small",
        "box_ap_rare": "box AP rare",
        "miou": "mean IoU",
        "top5_accuracy": "top-5 accuracy",
    }
    for name, title in titles.items():
        assert words_of(measure_of(name))
        assert title_of(name) == title
    assert title_of("box_of_a_later_version") == "box of_a_later_version"
    assert words_of(measure_of("box_ar10")) == "average recall with at most 10 detections an image"
    assert words_of("of a later version") == ""
