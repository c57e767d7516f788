"""LVIS and Pascal VOC scores, and average recall, against the libraries that define them."""

import copy
import logging
from collections import Counter

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import piip_scale.tasks.mmlab  # noqa: F401 - stands in for mmcv's compiled ops, which mmdet imports
from piip_scale.tasks.detection import error_kinds, pr_curves
from piip_scale.tasks.detection.metric import CocoMetric
from piip_scale.tasks.detection.scoring import Scoring

SIDE, IMAGES, CLASSES = 200, 40, 6
# What tidecv 1.0.1 counts in the set below, and what AP50 it says that each kind of error costs; AP50 itself.
TIDE = {
    "classification": (37, 0.049612516166),
    "localisation": (91, 0.135703029663),
    "both": (80, 0.039373146453),
    "duplicate": (64, 0.010762490903),
    "background": (82, 0.040074401089),
    "missed": (52, 0.07864036148),
}
TIDE_AP50 = 0.21794096244170177
# What lvis 0.5.3 gives for the set below: AP, AP50, AP75, small, medium, large, rare, common, frequent, and recall.
LVIS = {
    300: {
        "box_ap": 0.1067962121281684,
        "box_ap50": 0.28301390072475296,
        "box_ap75": 0.053068019509107354,
        "box_ap_s": 0.05865772612144804,
        "box_ap_m": 0.16445430898114555,
        "box_ap_l": -1.0,
        "box_ap_rare": 0.08735145706858513,
        "box_ap_common": 0.11066552068176454,
        "box_ap_frequent": 0.12237165863415546,
        "box_ar300": 0.26793248857361757,
    },
    6: {
        "box_ap": 0.07514457560234382,
        "box_ap50": 0.2083091740822353,
        "box_ap75": 0.030267919415657714,
        "box_ap_s": 0.04905678846272905,
        "box_ap_m": 0.10898676106702154,
        "box_ap_l": -1.0,
        "box_ap_rare": 0.06390787403171304,
        "box_ap_common": 0.08212264114267798,
        "box_ap_frequent": 0.07940321163264044,
        "box_ar6": 0.16316531762701117,
    },
}


def boxes(rng, count):
    corner = rng.uniform(0, 120, (count, 2)).round(1)
    return np.concatenate([corner, rng.uniform(8, 79, (count, 2)).round(1)], 1)


@pytest.fixture(scope="module")
def made():
    """A ground truth as LVIS has it, and results: most near an object, some of another class, some of nothing."""
    rng = np.random.default_rng(5)
    images, annotations, results = [], [], []
    for image_id in range(1, IMAGES + 1):
        there = rng.permutation(CLASSES) + 1
        images.append(
            {
                "id": image_id,
                "file_name": f"{image_id}.png",
                "height": SIDE,
                "width": SIDE,
                "neg_category_ids": there[4:].tolist(),
                "not_exhaustive_category_ids": there[3:5].tolist(),
            }
        )
        for box in boxes(rng, 5):
            category = int(rng.choice(there[:4]))
            note = {"bbox": box.tolist(), "area": float(box[2] * box[3]), "category_id": category, "iscrowd": 0}
            annotations.append(note | {"id": len(annotations) + 1, "image_id": image_id})
            for _ in range(int(rng.integers(0, 4))):
                near = box + rng.normal(0, 5, 4)
                found = category if rng.random() < 0.8 else int(rng.integers(1, CLASSES + 1))
                entry = {"image_id": image_id, "category_id": found, "bbox": near.clip(1).round(2).tolist()}
                results.append(entry | {"score": float(rng.random())})
        for box in boxes(rng, 4):
            entry = {"image_id": image_id, "category_id": int(rng.integers(1, CLASSES + 1)), "bbox": box.tolist()}
            results.append(entry | {"score": float(rng.random())})
    categories = [
        {"id": number, "name": f"c{number}", "frequency": "rcf"[number % 3], "image_count": 1}
        for number in range(1, CLASSES + 1)
    ]
    return {"images": images, "annotations": annotations, "categories": categories, "info": {}}, results


def scored(made, **scoring):
    truth, results = copy.deepcopy(made)
    return CocoMetric(truth, with_masks=False, scoring=Scoring(**scoring)).score_results(results)


@pytest.mark.parametrize("max_dets", [None, 3, 200])
def test_average_recall_is_pycocotools(made, max_dets):
    mine = scored(made, max_dets=max_dets)
    truth, results = copy.deepcopy(made)
    known = COCO()
    known.dataset = truth
    known.createIndex()
    reference = COCOeval(known, known.loadRes(results), "bbox")
    most = max_dets or 100
    reference.params.maxDets = [1, 2, 3] if max_dets == 3 else [1, 10, most]
    reference.evaluate()
    reference.accumulate()

    def mean(values):
        return values[values > -1].mean()

    recall, precision = reference.eval["recall"], reference.eval["precision"]
    expected = {f"box_ar{most}": mean(recall[:, :, 0, -1]), "box_ar1": mean(recall[:, :, 0, 0])}
    expected |= {"box_ap": mean(precision[..., 0, -1]), "box_ar_m": mean(recall[:, :, 2, -1])}
    assert {name: mine[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert ("box_ar10" in mine) == (max_dets != 3)


def test_curves_by_score_are_pycocotools_matches(made):
    truth, results = copy.deepcopy(made)
    metric = CocoMetric(truth, with_masks=False)
    metric.score_results(copy.deepcopy(results))
    curves = metric.pr_curves()
    assert list(curves) == ["box", *(f"box/c{number}" for number in range(1, CLASSES + 1))]
    known = COCO()
    known.dataset = truth
    known.createIndex()
    reference = COCOeval(known, known.loadRes(results), "bbox")
    reference.evaluate()
    least = np.linspace(0, 1, 101)
    for number in range(1, CLASSES + 1):
        images = [
            one for one in reference.evalImgs if one and one["category_id"] == number and one["aRng"] == [0, 1e10]
        ]
        scores = np.concatenate([one["dtScores"] for one in images])
        is_right = np.concatenate([one["dtMatches"][0] > 0 for one in images])
        objects = sum(len(one["gtIds"]) for one in images)
        right = np.array([(is_right & (scores >= at)).sum() for at in least])
        wrong = np.array([(~is_right & (scores >= at)).sum() for at in least])
        _, _, missed, precision, recall = found = curves[f"box/c{number}"]
        # Known at hundredths of recall.
        assert (right / objects - 0.01 - 1e-9 <= recall).all()
        assert (recall <= right / objects + 1e-9).all()
        assert found[0] + missed == pytest.approx(objects)
        # At each recall the best at that or more, which is never less than what the score itself gives.
        assert (precision + 1e-9 >= np.where(right > 0, right / np.maximum(right + wrong, 1), 0)).all()
        assert found[1] == pytest.approx(found[0] / precision - found[0], abs=0.5)
    of_classes = np.stack([curves[f"box/c{number}"] for number in range(1, CLASSES + 1)])
    assert curves["box"][:3] == pytest.approx(of_classes[:, :3].sum(0))
    assert curves["box"][3:] == pytest.approx(of_classes[:, 3:].mean(0))


def test_only_some_classes_have_curves_of_their_own(made, monkeypatch):
    monkeypatch.setattr(pr_curves, "MOST_CLASSES", 2)
    truth, results = copy.deepcopy(made)
    counts = Counter(note["category_id"] for note in truth["annotations"])
    truth["annotations"] = [note for note in truth["annotations"] if note["category_id"] != 1]
    metric = CocoMetric(truth, with_masks=False)
    assert metric.pr_curves() == {}
    metric.score_results(results)
    most = sorted(sorted(range(2, CLASSES + 1), key=lambda number: -counts[number])[:2])
    assert list(metric.pr_curves()) == ["box", *(f"box/c{number}" for number in most)]
    voc = CocoMetric(truth, with_masks=False, scoring=Scoring("voc"))
    voc.score_results(results)
    assert voc.pr_curves() == {}


def test_voc_is_mmdets_eval_map(made):
    from mmdet.evaluation.functional import eval_map

    truth, results = copy.deepcopy(made)
    for note in truth["annotations"][::7]:
        note["iscrowd"] = 1
    mine = scored((truth, results), style="voc")
    found = [[_corners(results, image, c) for c in range(1, CLASSES + 1)] for image in range(1, IMAGES + 1)]
    objects = [_objects(truth["annotations"], image) for image in range(1, IMAGES + 1)]
    mean, of_classes = eval_map(found, objects, iou_thr=0.5, logger="silent", nproc=1)
    assert mine["box_ap50"] == pytest.approx(mean, abs=1e-6)
    for number, one in enumerate(of_classes, 1):
        assert mine[f"per_class/box_ap50/c{number}"] == pytest.approx(float(one["ap"]), abs=1e-6)
    points, _ = eval_map(found, objects, iou_thr=0.5, logger="silent", nproc=1, eval_mode="11points")
    assert mine["box_ap50_11_points"] == pytest.approx(points, abs=1e-6)


@pytest.mark.parametrize("style", ["coco", "voc"])
def test_masks_that_fill_whole_boxes_score_as_the_boxes(made, style):
    """In every style that a set with masks may be scored by."""
    truth, results = copy.deepcopy(made)
    for entry in (*truth["annotations"], *results):
        entry["bbox"] = [float(round(side)) for side in entry["bbox"]]
        x, y, width, height = entry["bbox"]
        entry["area"] = width * height
        ring = [x, y, x + width, y, x + width, y + height, x, y + height]
        entry["segmentation"] = coco_mask.merge(coco_mask.frPyObjects([ring], SIDE, SIDE))
    found = CocoMetric(truth, with_masks=True, scoring=Scoring(style)).score_results(results)
    boxes_only = {name: value for name, value in found.items() if "box_" in name}
    assert boxes_only
    assert {name: found[name.replace("box_", "mask_")] for name in boxes_only} == pytest.approx(boxes_only, abs=1e-9)


def _corners(entries, image_id, category_id):
    own = [e for e in entries if (e["image_id"], e["category_id"]) == (image_id, category_id)]
    rows = [[*e["bbox"][:2], e["bbox"][0] + e["bbox"][2], e["bbox"][1] + e["bbox"][3], e["score"]] for e in own]
    return np.array(rows).reshape(-1, 5)


def _objects(annotations, image_id):
    found = {}
    for suffix, is_ignored in (("", 0), ("_ignore", 1)):
        own = [note for note in annotations if (note["image_id"], note["iscrowd"]) == (image_id, is_ignored)]
        corners = [[*n["bbox"][:2], n["bbox"][0] + n["bbox"][2], n["bbox"][1] + n["bbox"][3]] for n in own]
        found[f"bboxes{suffix}"] = np.array(corners, np.float64).reshape(-1, 4)
        found[f"labels{suffix}"] = np.array([note["category_id"] - 1 for note in own], int)
    return found


@pytest.mark.parametrize("max_dets", [300, 6])
def test_lvis_is_the_lvis_library(made, max_dets):
    mine = scored(made, style="lvis", max_dets=max_dets)
    assert {name: mine[name] for name in LVIS[max_dets]} == pytest.approx(LVIS[max_dets], abs=1e-12)
    assert scored(made)["box_ap"] != pytest.approx(mine["box_ap"], abs=1e-3)


def test_the_recorded_numbers_are_the_librarys_where_it_is_installed(made, monkeypatch):
    # It names numpy's former word for Python's float.
    monkeypatch.setattr(np, "float", float, raising=False)
    lvis = pytest.importorskip("lvis")
    for max_dets, recorded in LVIS.items():
        truth, results = copy.deepcopy(made)
        known = lvis.LVIS.__new__(lvis.LVIS)
        known.dataset = truth
        known.logger = logging.getLogger("lvis")
        known._create_index()
        evaluation = lvis.LVISEval(known, lvis.LVISResults(known, results, max_dets=max_dets), "bbox")
        evaluation.params.max_dets = max_dets
        evaluation.run()
        assert reference(evaluation.get_results(), max_dets) == pytest.approx(recorded, abs=1e-12)


def reference(found, max_dets):
    names = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_s", "APm": "ap_m", "APl": "ap_l"}
    names |= {"APr": "ap_rare", "APc": "ap_common", "APf": "ap_frequent", f"AR@{max_dets}": f"ar{max_dets}"}
    return {f"box_{mine}": float(found[theirs]) for theirs, mine in names.items()}


def test_errors_by_kind_are_tides(made, monkeypatch):
    truth, results = copy.deepcopy(made)
    for image in truth["images"]:
        # It has another way to say which classes an image is not labelled with.
        del image["neg_category_ids"], image["not_exhaustive_category_ids"]
    # Its places of recall differ from COCO's in their last bits, which recalls such as 7/20 meet.
    monkeypatch.setattr(error_kinds, "_RECALLS", np.arange(101) / 100)
    found = error_kinds.error_kinds(truth, results, "box", 100)
    assert found.ap50 == pytest.approx(TIDE_AP50, abs=1e-12)
    assert found.counts == {kind: count for kind, (count, _) in TIDE.items()}
    assert found.costs == pytest.approx({kind: cost for kind, (_, cost) in TIDE.items()}, abs=1e-11)


@pytest.mark.parametrize("style", ["coco", "lvis"])
def test_the_precision_that_errors_are_held_against_is_the_evaluations(made, style):
    truth, results = copy.deepcopy(made)
    if style == "coco":
        for image in truth["images"]:
            del image["neg_category_ids"], image["not_exhaustive_category_ids"]
    metric = CocoMetric(truth, with_masks=False, scoring=Scoring(style))
    ap50 = metric.score_results(results)["box_ap50"]
    assert metric.report_results(results).errors["box"].ap50 == pytest.approx(ap50, abs=1e-12)


def test_confusion_counts_each_object_and_each_detection_once(made):
    truth, results = made
    metric = CocoMetric(copy.deepcopy(truth), with_masks=False)
    metric.score_results(results)
    report = metric.report_results(results)
    assert report.confusion[:-1].sum(1).tolist() == report.columns["objects"]
    assert report.confusion[:, :-1].sum() == sum(result["score"] >= 0.3 for result in results)
    perfect = [
        {"image_id": n["image_id"], "category_id": n["category_id"], "bbox": n["bbox"], "score": 1.0}
        for n in truth["annotations"]
    ]
    metric.score_results(perfect)
    report = metric.report_results(perfect)
    assert np.array_equal(report.confusion, np.diag(report.confusion.diagonal()))
    assert all(values.min() == 1 for values in (report.curves["box"], np.array(report.columns["box_ap50"])))
