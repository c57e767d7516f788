"""Average precision against pycocotools, on one process and on several."""

import copy
import json
import pickle

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
import torch.distributed as dist
from preloaded import run_ranks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from piip_scale.data.reading.mask_checks import run_lengths
from piip_scale.errors import DataError
from piip_scale.tasks.base import Detections
from piip_scale.tasks.detection.metric import CocoMetric

SIDE = 200
# Ids neither consecutive nor in label order.
CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "box"}, {"id": 11, "name": "absent"}]


def _rle(box):
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    x1, y1, x2, y2 = np.round(box).astype(int)
    mask[y1:y2, x1:x2] = 1
    rle = coco_mask.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def _boxes(rng, count):
    corner = rng.uniform(0, 120, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(8, 79, (count, 2))], 1)


def _truth(num_images=12):
    rng = np.random.default_rng(0)
    annotations = []
    for image_id in range(1, num_images):  # the last image has none
        for box in _boxes(rng, int(rng.integers(1, 5))):
            width, height = box[2:] - box[:2]
            annotations.append(
                {
                    "id": len(annotations),  # 0 included
                    "image_id": image_id,
                    "category_id": int(rng.choice([7, 3])),
                    "bbox": [*box[:2], width, height],
                    "area": width * height,
                    "iscrowd": int(rng.random() < 0.1),
                    "segmentation": _rle(box),
                }
            )
    images = [{"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in range(1, num_images + 1)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}


def _found(truth, masks=True):
    """Noisy detections of the truth, with some invented ones."""
    rng = np.random.default_rng(1)
    labels = {7: 0, 3: 1}
    result = []
    for image in truth["images"]:
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        boxes = [np.array([*a["bbox"][:2], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]]) for a in own]
        boxes = [np.clip(box + rng.normal(0, 4, 4), 0, SIDE) for box in boxes] + list(_boxes(rng, 2))
        classes = [labels[a["category_id"]] for a in own] + [0, 1]
        result.append(
            Detections(
                image["id"],
                torch.tensor(np.array(boxes), dtype=torch.float32),
                torch.tensor(rng.permutation(len(boxes)) / 20 + 0.1, dtype=torch.float32),
                torch.tensor(classes),
                [_rle(box) for box in boxes] if masks else None,
            )
        )
    return result


def _reference(truth, found, kind):
    truth = copy.deepcopy(truth)
    for annotation in truth["annotations"]:
        annotation["id"] += 1
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    entries = []
    for detection in found:
        for k in range(len(detection.scores)):
            x1, y1, x2, y2 = detection.boxes_xyxy_px[k].tolist()
            entry = {"image_id": detection.image_id, "category_id": CATEGORIES[detection.labels[k]]["id"]}
            shape = {"bbox": [x1, y1, x2 - x1, y2 - y1]} if kind == "bbox" else {"segmentation": detection.masks_rle[k]}
            entries.append(entry | shape | {"score": detection.scores[k].item()})
    evaluation = COCOeval(coco, coco.loadRes(entries), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


@pytest.mark.parametrize(("part", "kind"), [("box", "bbox"), ("mask", "segm")])
def test_equals_pycocotools(part, kind, capsys):
    truth = _truth()
    found = _found(truth)
    metric = CocoMetric(truth, with_masks=True)
    metric.update(None, found)
    scores = metric.compute()
    assert capsys.readouterr() == ("", "")
    reference = _reference(truth, found, kind)
    mine = [scores[f"{part}_{key}"] for key in ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")]
    np.testing.assert_allclose(mine, reference.stats[:6], atol=1e-9)
    assert 0.1 < scores[f"{part}_ap50"] < 1
    by_id = dict(zip(reference.params.catIds, reference.eval["precision"][0, :, :, 0, -1].mean(0), strict=True))
    for category in CATEGORIES:
        assert scores[f"per_class/{part}_ap50/{category['name']}"] == pytest.approx(by_id[category["id"]], abs=1e-9)


def test_perfect_detections_score_one_and_none_score_zero():
    truth = _truth()
    perfect = []
    for image in truth["images"]:
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([[*a["bbox"][:2], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]] for a in own])
        labels = torch.tensor([0 if a["category_id"] == 7 else 1 for a in own], dtype=torch.long)
        perfect.append(Detections(image["id"], boxes.view(-1, 4), torch.ones(len(own)), labels))
    metric = CocoMetric(truth, with_masks=False)
    metric.update(None, perfect)
    scores = metric.compute()
    assert scores["box_ap"] == pytest.approx(1.0)
    assert "mask_ap" not in scores
    nothing = CocoMetric(truth, with_masks=True)
    nothing.update(None, [Detections(1, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), [])])
    scores = nothing.compute()
    assert scores["box_ap"] == scores["mask_ap"] == scores["per_class/box_ap50/disc"] == 0.0
    assert scores["per_class/box_ap50/absent"] == -1.0


@pytest.mark.parametrize("rank", [0, 1])
def test_results_go_to_rank_0_alone_and_numbers_to_all(rank, monkeypatch):
    """Were each rank sent what all have found, a thousand ranks would hold a thousand copies of it."""
    sent = []

    def gather_object(value, values, dst):
        sent.append(("to rank", dst, len(pickle.dumps(value))))
        if values is not None:
            values[:] = [value, {}]

    def broadcast_object_list(box, src):
        sent.append(("from rank", src, len(pickle.dumps(box))))

    # Every other collective fails: there is no group.
    world = {"is_initialized": lambda: True, "get_world_size": lambda: 2, "get_rank": lambda: rank}
    for name, stand_in in (world | {f.__name__: f for f in (gather_object, broadcast_object_list)}).items():
        monkeypatch.setattr(dist, name, stand_in)
    truth = _truth()
    metric = CocoMetric(truth, with_masks=True)
    metric.update(None, _found(truth))
    metric.compute()
    (*to_main, results_bytes), (*from_main, numbers_bytes) = sent
    assert (to_main, from_main) == (["to rank", 0], ["from rank", 0])
    assert numbers_bytes < results_bytes / 2


def test_a_set_without_objects_has_no_precision():
    truth = _truth() | {"annotations": []}
    metric = CocoMetric(truth, with_masks=False)
    assert metric.compute()["box_ap"] == -1.0
    metric.update(None, _found(truth))
    assert metric.compute()["box_ap"] == -1.0


def test_an_image_counts_once_and_the_truth_is_left_alone():
    truth = _truth()
    before = copy.deepcopy(truth)
    found = _found(truth)
    once, twice = (CocoMetric(truth, with_masks=True) for _ in range(2))
    once.update(None, found)
    twice.update(None, found)
    twice.update(None, found[:3])
    assert once.compute() == twice.compute() == twice.compute()
    assert truth == before


def test_optional_keys_may_be_missing():
    truth = _truth()
    for annotation in truth["annotations"]:
        for key in ("area", "iscrowd", "segmentation"):
            annotation.pop(key)
    metric = CocoMetric(truth, with_masks=False)
    metric.update(None, _found(truth, masks=False))
    assert 0 < metric.compute()["box_ap50"] < 1


SHORT_MASKS = {
    "half of the image": {
        "size": [SIDE, SIDE],
        "counts": coco_mask.frPyObjects(
            {"size": [SIDE // 2, SIDE], "counts": [100, 40, SIDE * SIDE // 2 - 140]}, SIDE // 2, SIDE
        )["counts"].decode(),
    },
    "one number": {"size": [SIDE, SIDE], "counts": "1"},
    "below 0": {"size": [SIDE, SIDE], "counts": "O" * 20},
    "cut off": {"size": [SIDE, SIDE], "counts": "P" * 20},
    "no numbers": {"size": [SIDE, SIDE], "counts": ""},
    "not packed": {"size": [SIDE, SIDE], "counts": [100, 40]},
    "of another size": {"size": [10, 10], "counts": coco_mask.encode(np.ones((10, 10), np.uint8, "F"))["counts"]},
    "no mask": {},
}


@pytest.fixture
def no_foreign_code(monkeypatch):
    """What would hang fails at once instead."""

    def called(*_, **__):
        raise AssertionError("the evaluator was called")

    monkeypatch.setattr("faster_coco_eval.COCOeval_faster.run", called)


@pytest.mark.parametrize("mask", SHORT_MASKS.values(), ids=SHORT_MASKS)
def test_a_mask_that_does_not_fill_its_image_never_reaches_the_evaluator(mask, no_foreign_code):
    truth = _truth()
    damaged = copy.deepcopy(truth)
    damaged["annotations"][1]["segmentation"] = mask
    with pytest.raises(DataError, match=r"^mask of annotation 2 of image 1: got ") as error:
        CocoMetric(damaged, with_masks=True)
    assert "\n" not in str(error.value)
    metric, found = CocoMetric(truth, with_masks=True), _found(truth)
    found[3].masks_rle[0] = mask
    with pytest.raises(DataError, match=r"^mask of a detection of image 4: got "):
        metric.update(None, found)


def test_masks_that_are_not_scored_are_never_looked_at():
    truth = _truth()
    for annotation in truth["annotations"]:
        annotation["segmentation"] = SHORT_MASKS["half of the image"]
    metric = CocoMetric(truth, with_masks=False)
    metric.update(None, _found(truth, masks=False))
    assert 0 < metric.compute()["box_ap50"] < 1


def test_run_lengths_as_a_list_score_as_packed_ones():
    truth, listed = _truth(), _truth()
    for annotation in listed["annotations"]:
        annotation["segmentation"]["counts"] = run_lengths(annotation["segmentation"]["counts"]).tolist()
    scores = []
    for each in (truth, listed):
        metric = CocoMetric(each, with_masks=True)
        metric.update(None, _found(truth))
        scores.append(metric.compute())
    assert scores[0] == scores[1]


def _scores_and_results(world, _device):
    truth = _truth()
    metric = CocoMetric(truth, with_masks=True)
    found = _found(truth)
    # The last image is on both ranks, as when a tail is padded.
    metric.update(None, found[world.rank :: world.num_ranks] + found[-1:])
    return metric.compute(), len(metric.results())


def test_ranks_agree_with_one_process():
    truth = _truth()
    alone = CocoMetric(truth, with_masks=True)
    alone.update(None, _found(truth))
    for rank, (scores, count) in enumerate(run_ranks(2, _scores_and_results)):
        assert scores == alone.compute()
        assert count == (0 if rank else len(alone.results()))


def test_results_file_is_cocos_and_whole(tmp_path):
    truth = _truth()
    metric = CocoMetric(truth, with_masks=True)
    metric.update(None, _found(truth))
    metric.write_results(tmp_path / "results.json")
    loaded = json.loads((tmp_path / "results.json").read_text())
    assert set(loaded[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert {entry["category_id"] for entry in loaded} == {7, 3}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError):
        metric.write_results(tmp_path / "file" / "results.json")
