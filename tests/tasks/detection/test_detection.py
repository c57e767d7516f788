"""The task over real shards: train, evaluate, save, load, and predict on files."""

import json
import logging
import re

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_detectors import CLASSES, run_config

from piip_scale.data.images import read_photo
from piip_scale.data.packing.pack import pack_coco
from piip_scale.errors import ConfigError, DataError, ModelError
from piip_scale.tasks.classes import class_names
from piip_scale.tasks.detection.model import build_detection_model
from piip_scale.tasks.detection.prediction import DetectionPredictor
from piip_scale.tasks.detection.task import MASK_KINDS, DetectionTask
from piip_scale.tasks.kinds import load_model
from piip_scale.world import World

SIZE_HW = (60, 80)


def _pack(folder, num_images, masks):
    """Squares of three classes on noise."""
    rng = np.random.default_rng(num_images)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        pixels = rng.integers(0, 60, (*SIZE_HW, 3), dtype=np.uint8)
        for k in range(2):
            x, y, side = 5 + 40 * k, int(rng.integers(5, 25)), int(rng.integers(14, 30))
            label = int(rng.integers(3))
            pixels[y : y + side, x : x + side, label] = 255
            box = [x, y, side, side]
            note = {"bbox": box, "category_id": 10 + label, "image_id": image_id, "area": side * side, "iscrowd": 0}
            if masks:
                corners = [x, y, x + side, y, x + side, y + side, x, y + side]
                note["segmentation"] = [corners]
            annotations.append(note | {"id": len(annotations) + 1})
        name = f"{image_id}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": image_id, "file_name": name, "height": SIZE_HW[0], "width": SIZE_HW[1]})
    categories = [{"id": 10 + label, "name": name} for label, name in enumerate(CLASSES)]
    root = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(root))
    pack_coco(folder / "annotations.json", folder / "images", folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return {
        "train": _pack(folder / "train", 8, masks=True),
        "val": _pack(folder / "val", 5, masks=True),
        "boxes": _pack(folder / "boxes", 4, masks=False),
        "images": folder / "val" / "images",
    }


def _config(shards, kind="mask_rcnn", train="train", val="val", **more):
    data = {"augment": {"short_edge_px": (96,), "max_edge_px": 128}, "num_streams": 2, "workers": 0}
    data |= {"micro_batch_size": 2, "train_shards": str(shards[train]), "val_shards": str(shards[val])}
    return run_config(kind, **(data | more))


def test_a_set_with_nothing_to_train_on_does_not_start(shards, tmp_path, caplog, monkeypatch):
    source = shards["images"].parent
    root = json.loads((source / "annotations.json").read_text())
    (tmp_path / "ann.json").write_text(json.dumps(root | {"annotations": []}))
    pack_coco(tmp_path / "ann.json", shards["images"], tmp_path / "empty")
    sets = shards | {"empty": tmp_path / "empty"}
    with pytest.raises(DataError, match="its 5 images have no objects"):
        DetectionTask(_config(sets, "faster_rcnn", train="empty"), World()).num_train_batches()
    monkeypatch.setattr(logging.getLogger("piip_scale"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="piip_scale"):
        DetectionTask(_config(sets, "faster_rcnn"), World()).num_train_batches()
    assert "16 of 16 objects can be trained on" in caplog.text


def test_a_short_training_lowers_the_loss_and_evaluates(shards):
    task = DetectionTask(_config(shards), World())
    assert task.classes == CLASSES
    assert all(parameter.is_meta for parameter in task.build_model().backbone.parameters())
    torch.manual_seed(0)
    model = build_detection_model(task.config, len(task.classes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for epoch in range(5):
        batches = list(task.train_batches(epoch, 0))
        assert len(batches) == task.num_train_batches() == 4
        for batch in batches:
            loss = sum(value for name, value in model(batch=batch).items() if "loss" in name)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            totals.append(loss.item())
    assert np.mean(totals[-4:]) < 0.7 * np.mean(totals[:4])
    metric = task.build_metric()
    model.eval()
    batches = list(task.val_batches())
    assert len(batches) == task.num_val_batches() == 3
    for batch in batches:
        metric.update(batch, model.predict(batch))
    scores = metric.compute()
    assert {"box_ap", "mask_ap", "per_class/box_ap50/star"} <= set(scores)
    assert metric.results()


def test_truth_as_detections_scores_one_through_the_whole_way_back(shards):
    """Loader, resizing and padding there, boxes and masks back: what training aims at is what evaluation counts."""
    from piip_scale.tasks.detection.mini_masks import MiniMasks
    from piip_scale.tasks.detection.samples import detections

    task = DetectionTask(_config(shards), World())
    metric = task.build_metric()
    for batch in task.val_batches():
        found = []
        for instances, info in zip(batch.instances, batch.infos, strict=True):
            scale = torch.tensor([*info.scale_xy, *info.scale_xy])
            boxes = instances.boxes_xyxy_px / scale
            masks = MiniMasks(instances.mini_masks, boxes, *info.original_size_px).to_tensor(torch.bool, "cpu")
            truth = {"bboxes": boxes, "scores": torch.ones(len(boxes)), "labels": instances.labels, "masks": masks}
            found.append(detections(truth, info))
        metric.update(batch, found)
    scores = metric.compute()
    assert scores["box_ap"] > 0.98
    assert scores["mask_ap"] > 0.98


def test_boxes_only_shards_suit_box_detectors_only(shards):
    task = DetectionTask(_config(shards, "faster_rcnn", train="boxes", val="boxes"), World())
    metric = task.build_metric()
    assert "mask_ap" not in metric.compute()
    assert len(next(iter(task.train_batches(0, 0)))) == 2
    masks_wanted = DetectionTask(_config(shards, train="boxes"), World())
    with pytest.raises(DataError, match=r"boxes without masks.*faster_rcnn"):
        masks_wanted.num_train_batches()


def test_evaluating_needs_no_training_shards(shards):
    config = _config(shards, train="val").model_copy()
    config = config.model_copy(update={"data": config.data.model_copy(update={"train_shards": "/nowhere"})})
    assert len(list(DetectionTask(config, World()).val_batches())) == 3
    assert class_names(config) == CLASSES
    lost = config.model_copy(update={"data": config.data.model_copy(update={"val_shards": "/nowhere"})})
    with pytest.raises(DataError, match="/nowhere"):
        DetectionTask(lost, World())
    with pytest.raises(ConfigError, match=r"data\.classes"):
        class_names(lost)


def test_mask_kinds_are_those_that_build_a_mask_head(shards):
    for kind in ("mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "dino"):
        assert build_detection_model(run_config(kind), 3).heads.has_masks == (kind in MASK_KINDS)


@pytest.fixture
def trained(shards, tmp_path):
    torch.manual_seed(3)
    config = _config(shards)
    model = build_detection_model(config, 3)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    return config, model, tmp_path / "model.safetensors"


def test_weights_come_back_from_one_file_and_from_several(trained, tmp_path):
    config, model, path = trained
    tensors = load_file(path)
    folder = tmp_path / "parts"
    folder.mkdir()
    names = list(tensors)
    save_file({n: tensors[n] for n in names[::2]}, folder / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, folder / "model-00002-of-00002.safetensors")
    for source in (path, folder):
        loaded = load_model(config, source)
        assert not loaded.training
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_weights_that_do_not_fit_are_named(trained, tmp_path):
    config, _, path = trained
    tensors = load_file(path)
    names = list(tensors)
    del tensors[names[0]]
    tensors[names[1]] = torch.zeros(3)
    tensors["stranger"] = torch.zeros(1)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ModelError) as caught:
        load_model(config, tmp_path / "other.safetensors")
    line = str(caught.value)
    assert f"1 missing ({names[0]})" in line
    assert "1 unexpected (stranger)" in line
    assert f"1 of another shape ({names[1]} [3] for" in line
    assert "\n" not in line


def test_absent_and_damaged_weights_are_one_line(trained, tmp_path):
    config, _, path = trained
    with pytest.raises(ModelError, match="not found"):
        load_model(config, tmp_path / "nothing.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=re.escape(str(cut))) as caught:
        load_model(config, cut)
    assert "\n" not in str(caught.value)


def test_files_are_predicted_like_shards(trained, shards):
    config, model, _ = trained
    model.eval()
    paths = [shards["images"] / f"{image_id}.png" for image_id in range(1, 6)]
    predictor = DetectionPredictor(model, config.data.augment, CLASSES, min_score=0.5)
    from_files = [predictor.predict(read_photo(path), i) for i, path in enumerate(paths, 1)]
    single = config.model_copy(update={"data": config.data.model_copy(update={"micro_batch_size": 1})})
    for batch, mine in zip(DetectionTask(single, World()).val_batches(), from_files, strict=True):
        theirs = model.predict(batch)[0]
        assert mine.image_id == theirs.image_id
        torch.testing.assert_close(mine.boxes_xyxy_px, theirs.boxes_xyxy_px)
        assert mine.masks_rle == theirs.masks_rle
        assert all(coco_mask.decode(rle).shape == SIZE_HW for rle in mine.masks_rle)


def test_missing_and_truncated_images_are_one_line(tmp_path, shards):
    with pytest.raises(DataError, match=r"nothing\.jpg cannot be read"):
        read_photo(tmp_path / "nothing.jpg")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for suffix in ("jpg", "png"):
        whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
        noise.save(whole)
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        assert read_photo(whole).shape == (64, 64, 3)
        with pytest.raises(DataError, match=rf"cut\.{suffix}") as caught:
            read_photo(cut)
        assert "\n" not in str(caught.value)
