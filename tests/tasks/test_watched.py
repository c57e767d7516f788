"""The images that every evaluation of a training draws: the same ones, of each task, whichever rank has them."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from made_sets import make_coco, make_maps, write_jpeg
from small_segmentors import run_config as segmentation_config

from piip_scale.config.loading import check_config
from piip_scale.data.packing.pack import coco_source
from piip_scale.data.packing.pack_classes import folder_source
from piip_scale.data.packing.pack_maps import label_map_source
from piip_scale.data.packing.packing import PackOptions
from piip_scale.data.packing.unpacked import UnpackedSet
from piip_scale.data.reading.label_maps import decode_mapped
from piip_scale.errors import ConfigError, DataError
from piip_scale.tasks import watched
from piip_scale.tasks.base import Detections, Segmentation
from piip_scale.tasks.classification.model import Classification
from piip_scale.tasks.classification.task import ClassificationTask
from piip_scale.tasks.detection.task import DetectionTask
from piip_scale.tasks.segmentation.task import SegmentationTask
from piip_scale.tasks.watched import watched_numbers
from piip_scale.world import World

HOW = PackOptions()
_BRANCHES = [{"resolution_px": px, "embed_dim": 32, "depth": 2, "num_heads": 2} for px in (32, 64)]


def values(task, **sections):
    return {
        "task": task,
        "model": {"branches": _BRANCHES, "interaction": {"num_stages": 2, "num_heads": 2}},
        "data": {"train_shards": "train", "val_shards": "val"},
        "train": {"steps": 1},
    } | sections


@pytest.fixture
def detection(tmp_path):
    path, images = make_coco(tmp_path, 8)
    samples = UnpackedSet(coco_source(path, images, how=HOW), HOW, "detection", "val")
    config = check_config(values("detection", detector={"kind": "faster_rcnn"}))
    return DetectionTask(config, World(), val_set=samples)


def image_ids(task):
    return [task.val_set.notes(number)["image_id"] for number in range(task.num_val_samples())]


def opened(content):
    return np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB"), dtype=np.int16)


def sides(content):
    both = opened(content)
    return both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]


def differ(one, other):
    """The share of pixels that are another colour, what JPEG does to them left aside."""
    return float((np.abs(one - other).max(-1) > 60).mean())


def found_boxes(image_id, score):
    box = torch.tensor([[4.0, 4.0, 40.0, 30.0]])
    return Detections(image_id, box, torch.tensor([score]), torch.zeros(1, dtype=torch.long))


def test_boxes_stand_beside_the_truth_of_the_same_images_each_time(detection):
    ids, drawn = image_ids(detection), []
    for score in (0.9, 0.9, 0.1):
        seen = detection.watched()
        # The last batch of a rank repeats samples: the first answer counts.
        for of_score in (score, 0.0):
            seen.keep([found_boxes(image_id, of_score) for image_id in ids])
        drawn.append(seen.pictures())
    assert [*drawn[0]] == [detection.val_set.keys[number] for number in (1, 3, 5, 7)]
    assert drawn[0] == drawn[1]
    for key, content in drawn[0].items():
        assert len(content) < 40_000
        truth, found = sides(content)
        _, nothing = sides(drawn[2][key])
        assert truth.shape[1] == found.shape[1] == 320
        assert differ(found, nothing) > 0.01
    # Image 4 of the set holds nothing, and was not watched; image 1 one object, which a detector of nothing misses.
    truth, nothing = sides(drawn[2][detection.val_set.keys[1]])
    assert differ(truth, nothing) > 0.003


def test_ranks_have_different_images_of_them(detection, monkeypatch):
    ids = image_ids(detection)
    ranks = []
    for share in (ids[::2], ids[1::2]):
        ranks.append(detection.watched())
        ranks[-1].keep([found_boxes(image_id, 0.9) for image_id in share])
    monkeypatch.setattr(watched, "gathered_on_main", lambda _: [rank._found for rank in ranks])
    whole = detection.watched()
    whole.keep([found_boxes(image_id, 0.9) for image_id in ids])
    apart = ranks[0].pictures()
    monkeypatch.undo()
    assert apart == whole.pictures()


def test_what_cannot_be_drawn_is_left_out_and_told(detection, monkeypatch, caplog):
    seen = detection.watched()
    first, second, *_ = watched_numbers(detection.val_set, 4)
    seen.keep([found_boxes(image_ids(detection)[number], 0.9) for number in (first, second)])
    read = detection.val_set.read

    def broken(number):
        if number == first:
            raise DataError("a file is gone")
        return read(number)

    monkeypatch.setattr(detection.val_set, "read", broken)
    monkeypatch.setattr(watched, "get_logger", lambda name: SimpleNamespace(warning=lambda *told: lines.append(told)))
    lines = []
    assert [*seen.pictures()] == [detection.val_set.keys[second]]
    assert [text % words for text, *words in lines for words in [tuple(words)]] == [
        f"no picture of {detection.val_set.keys[first]}: a file is gone"
    ]


def test_label_maps_stand_beside_theirs(tmp_path):
    images, maps = make_maps(tmp_path)
    names = ("sky", "wall", "tree", "road")
    samples = UnpackedSet(label_map_source(images, maps, classes=names, how=HOW), HOW, "segmentation", "val")
    task = SegmentationTask(segmentation_config(), World(), val_set=samples)
    drawn = []
    for right in (True, False):
        seen = task.watched()
        for number, image_id in enumerate(image_ids(task)):
            labels = torch.from_numpy(decode_mapped(samples.read(number), samples.map_rule).labels.copy())
            seen.keep([Segmentation(image_id, labels if right else torch.zeros_like(labels))])
        drawn.append(seen.pictures())
    assert len(drawn[0]) == 4
    for key, content in drawn[0].items():
        assert differ(*sides(content)) < 0.02
        assert differ(*sides(drawn[1][key])) > 0.2


def test_guesses_stand_beside_the_class(tmp_path):
    names = ["bee", "cow", "elk"]
    for number, name in enumerate(names):
        write_jpeg(tmp_path / name / "0.jpg", 40, 56, number)
    samples = UnpackedSet(folder_source(tmp_path, classes=names, how=HOW), HOW, "classification", "val")
    task = ClassificationTask(check_config(values("classification")), World(), val_set=samples)
    seen = task.watched()
    chances = torch.tensor([0.7, 0.2, 0.1])
    seen.keep([Classification(image_id, torch.tensor([2, 1, 0]), chances) for image_id in image_ids(task)])
    drawn = seen.pictures()
    # No more than the set has.
    assert [*drawn] == [*samples.keys]
    for content in drawn.values():
        truth, found = sides(content)
        letters = [side[:100, :100] for side in (truth, found)]
        assert differ(*letters) > 0.02


def test_which_are_watched_is_read_from_the_config(detection):
    samples = detection.val_set
    assert watched_numbers(samples, 0) == []
    assert watched_numbers(samples, 1) == [4]
    assert watched_numbers(samples, 99) == [*range(8)]
    assert watched_numbers(samples, (samples.keys[6], samples.keys[0])) == [6, 0]
    with pytest.raises(DataError, match=r"telemetry.pictures: got 'nothing'; it names samples of val"):
        watched_numbers(samples, ("nothing",))
    for wrong, rule in (
        ({"pictures": -1}, "pictures"),
        ({"pictures": ["a", "a"]}, "each once"),
        ({"trackers": ["tensorbord"]}, "trackers"),
        ({"trackers": ["wandb", "wandb"]}, "each once"),
    ):
        with pytest.raises(ConfigError, match=rule):
            check_config(values("detection", detector={"kind": "faster_rcnn"}, telemetry=wrong))
