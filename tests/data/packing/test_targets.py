"""What can be trained on is said by packing, verifying and starting; nothing at all is an error."""

import json

import numpy as np
import PIL.Image
import pytest
from made_sets import make_coco, make_maps
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.packing.pack_maps import pack_label_maps
from piip_scale.data.packing.verify import verify_shards
from piip_scale.data.reading.files import json_bytes
from piip_scale.data.reading.shards import ShardSet
from piip_scale.data.reading.targets import Targets, check_trainable, targets_lines
from piip_scale.errors import DataError


def changed(annotations, change):
    root = json.loads(annotations.read_text())
    for number, note in enumerate(root["annotations"]):
        change(number, note)
    annotations.write_text(json.dumps(root))


def scale_to_1(number, note):
    note["bbox"] = [value / 64 for value in note["bbox"]]
    note.pop("segmentation")


def test_what_is_left_out_is_counted_by_class_and_reason(tmp_path):
    annotations, images = make_coco(tmp_path, 12)
    marks = {0: {"iscrowd": 1}, 1: {"ignore": 1}, 2: {"area": 0}, 3: {"bbox": [5, 5, 0.5, 9]}}
    changed(annotations, lambda number, note: note.update(marks.get(number, {})))
    notes = json.loads(annotations.read_text())["annotations"]
    manifest = pack_coco(annotations, images, tmp_path / "out")
    names = {2: "b", 7: "a"}
    lines = targets_lines("detection", ["b", "a"], manifest.targets)
    assert lines[0] == "14 of 18 objects can be trained on; left out: 3 ignored or crowds, 1 under 1 px wide or high"
    for label, key in enumerate(names):
        used = sum(note["category_id"] == key for note in notes[4:])
        assert manifest.targets.trainable[label] == used
        assert f"class {names[key]}: {used} of" in "; ".join(lines)
    report = verify_shards(tmp_path / "out", workers=1)
    assert (report.targets, report.problems) == (manifest.targets, ())
    # What is counted is what the trainer gets.
    shards = ShardSet.open(tmp_path / "out")
    assert report.num_targets == 14 + 3
    assert shards.manifest.targets == manifest.targets


def test_coordinates_of_0_to_1_are_no_set(tmp_path):
    annotations, images = make_coco(tmp_path, 8)
    changed(annotations, scale_to_1)
    with pytest.raises(DataError, match=r"of 12 objects in 8 images, 12 under 1 px .*0-1\?"):
        pack_coco(annotations, images, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_set_packed_before_is_verified_by_what_it_holds(tmp_path):
    annotations, images = make_coco(tmp_path, 5, masks=False)
    pack_coco(annotations, images, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["targets"] = None
    (tmp_path / "out" / "manifest.json").write_bytes(json_bytes(manifest))
    report = verify_shards(tmp_path / "out", workers=1)
    assert report.targets.num_trainable == 6


def test_a_set_without_annotations_packs_and_does_not_train(tmp_path):
    annotations, images = make_coco(tmp_path, 3)
    root = json.loads(annotations.read_text()) | {"annotations": []}
    annotations.write_text(json.dumps(root))
    manifest = pack_coco(annotations, images, tmp_path / "out")
    assert verify_shards(tmp_path / "out", workers=1).problems == ()
    with pytest.raises(DataError, match="its 3 images have no objects"):
        check_trainable("detection", manifest.targets, "here", 3)


def test_pixels_are_counted_when_they_are_packed(tmp_path):
    images, maps = make_maps(tmp_path)
    stored = [np.array(PIL.Image.open(path)).ravel() for path in maps.rglob("*.png")]
    values = np.bincount(np.concatenate(stored), minlength=256).tolist()
    manifest = pack_label_maps(images, maps, tmp_path / "out", classes=["a", "b", "c", "d", "e"])
    assert manifest.targets == Targets(trainable=(*values[:4], 0), left_out={"unlabelled": (values[255],)})
    lines = targets_lines("segmentation", ["a", "b", "c", "d", "e"], manifest.targets)
    assert f"left out: {values[255] / sum(values):.1%} of no class" in lines[0]
    assert lines[1] == "classes without pixels to train on: e"
    assert verify_shards(tmp_path / "out", workers=1).targets == manifest.targets
    for path in maps.rglob("*.png"):
        PIL.Image.fromarray(np.full_like(np.array(PIL.Image.open(path)), 255)).save(path)
    with pytest.raises(DataError, match=r"nothing in .* can be trained on"):
        pack_label_maps(images, maps, tmp_path / "none", classes=["a"])


def test_commands_say_it(tmp_path):
    annotations, images = make_coco(tmp_path, 8)
    changed(annotations, lambda number, note: note.update(iscrowd=int(number == 0)))
    out = str(tmp_path / "out")
    pack = ["shards", "pack", "coco", str(annotations), "--images", str(images), "--out", out]
    for command in (pack, ["shards", "verify", out, "--workers", "1"], ["shards", "show", out]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert "11 of 12 objects can be trained on; left out: 1 ignored or crowds" in result.output
