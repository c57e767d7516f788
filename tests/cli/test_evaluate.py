"""Evaluating by command: on several ranks and straight from a source, the same to the last digit."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial

import pytest
from commands import failed_in_one_line, piip_scale, succeeded
from opened_sets import assert_opened_once
from PIL import Image
from sections.file_operations import log_operations, logged_operations
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.data.order import whole_batches
from piip_scale.data.packing.pack import coco_source
from piip_scale.data.packing.packing import PackOptions
from piip_scale.data.packing.unpacked import UnpackedSet


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    """What one process finds, and how it scores that."""
    return evaluated(trained, tmp_path_factory.mktemp("alone"))


def evaluated(run, folder, *options, **settings):
    """The bytes of predictions and metrics."""
    found, metrics = folder / "found.json", folder / "metrics.json"
    succeeded(piip_scale("evaluate", run, "--predictions", found, "--out", metrics, *options, **settings))
    return found.read_bytes(), metrics.read_bytes()


@pytest.mark.parametrize("procs", [2, 3])
def test_ranks_share_the_images_and_find_the_same(trained, alone, shards, tmp_path, procs):
    # Six images in batches of one: three ranks have two each; of four a batch, one rank has nothing to do.
    size = {2: 1, 3: 4}[procs]
    options = ("--set", f"data.micro_batch_size={size}")
    expected = evaluated(trained, tmp_path, *options)
    noted = partial(log_operations, shards, log := tmp_path / "operations.txt")
    assert evaluated(trained, tmp_path, *options, "--procs", procs, preexec_fn=noted) == expected
    assert_opened_once(logged_operations(log).values(), [shards / "val"], num_processes=procs)
    assert len({entry["image_id"] for entry in json.loads(expected[0])}) > 1


def test_a_coco_file_gives_what_its_shards_give(trained, scenes, alone, tmp_path):
    source = ("--coco", scenes.val, "--images", scenes.images)
    assert evaluated(trained, tmp_path, *source) == alone


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_every_sample_is_in_one_batch_of_one_rank(num_ranks):
    batches = [whole_batches(10, num_ranks=num_ranks, rank=rank, batch_size=3) for rank in range(num_ranks)]
    alone = whole_batches(10, num_ranks=1, rank=0, batch_size=3)
    dealt = sorted([batch.tolist() for of_rank in batches for batch in of_rank])
    assert dealt == [batch.tolist() for batch in alone] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_an_error_of_all_ranks_is_reported_by_one(trained):
    failed_in_one_line(piip_scale("evaluate", trained, "--procs", 2, "--step", 5), "no checkpoint of step 5")


def test_a_broken_image_is_reported_and_passed_by(trained, scenes, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(scenes.images, images)
    entry = json.loads(scenes.val.read_text())["images"][2]
    content = (images / entry["file_name"]).read_bytes()
    (images / entry["file_name"]).write_bytes(content[: len(content) // 3])
    arguments = ("evaluate", trained, "--coco", scenes.val, "--images", images)
    found = tmp_path / "found.json"
    done = succeeded(piip_scale(*arguments, "--predictions", found, "--set", "data.max_broken_share=0.5"))
    assert f"sample {entry['id']:012d} is left out: " in done.stderr
    assert "1 image(s) could not be used" in done.stderr
    assert entry["id"] not in {one["image_id"] for one in json.loads(found.read_text())}
    failed_in_one_line(piip_scale(*arguments), "too many broken samples", "data.max_broken_share")


def refused(*arguments):
    """The line of an error, in this process."""
    done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert done.exit_code != 0
    return str(done.exception)


def test_sets_that_do_not_fit_are_one_line(trained, scenes, tmp_path):
    truth = json.loads(scenes.val.read_text())
    other, empty, images = tmp_path / "other.json", tmp_path / "empty.json", ("--images", scenes.images)
    other.write_text(json.dumps(truth | {"categories": [c | {"name": f"{c['name']}x"} for c in truth["categories"]]}))
    empty.write_text(json.dumps(truth | {"images": [], "annotations": []}))
    assert "they must be the classes ['0', '1'" in refused(trained, "--coco", other, *images)
    assert "has no images" in refused(trained, "--coco", empty, *images)
    assert "none.json" in refused(trained, "--coco", tmp_path / "none.json", *images)
    assert "name the folder of its images with --images" in refused(trained, "--coco", scenes.val)
    assert "name one of them" in refused(trained, "--coco", scenes.val, *images, "--shards", "x")
    assert "goes with --coco" in refused(trained, *images)


def test_an_unpacked_set_is_the_packed_one(config, scenes, shards):
    from piip_scale.data.reading.shards import ShardSet

    how = PackOptions()
    unpacked = UnpackedSet(coco_source(scenes.val, scenes.images, how=how), how, "detection", "val")
    packed = ShardSet.open(shards / "val")
    assert list(unpacked.keys) == packed.keys.tolist()
    assert (unpacked.classes, unpacked.has_masks) == (packed.classes, packed.has_masks)
    assert unpacked.coco_ground_truth() == packed.coco_ground_truth()
    assert [unpacked.read(number) for number in range(len(packed))] == [packed.read(n) for n in range(len(packed))]


def test_predictions_score_again_without_the_model(trained, scenes, shards, alone, tmp_path):
    found = tmp_path / "found.json"
    found.write_bytes(alone[0])
    for truth in (("--coco", scenes.val), ("--shards", shards / "val")):
        folder = tmp_path / truth[0]
        done = CliRunner().invoke(app, ["evaluate", *map(str, ("--results", found, *truth, "--out", folder))])
        assert done.exit_code == 0, done.output
        assert json.loads((folder / "metrics.json").read_text()) == pytest.approx(json.loads(alone[1]), abs=1e-12)
        names = ["confusion.png", "evaluation.html", "metrics.json", "per_class.csv", "pr_curve_box.png"]
        names.append("pr_curve_mask.png")
        drawn = sorted(path.name for path in (folder / "pictures").glob("*"))
        pairs = [f"{kind}_{number}.jpg" for kind in ("best", "worst") for number in (1, 2, 3)]
        assert drawn == (pairs if truth[0] == "--shards" else [])
        assert sorted(path.name for path in folder.iterdir() if path.is_file()) == names
        assert (folder / "per_class.csv").read_text().splitlines()[0].startswith("class,objects,box_ap50,box_ap,mask_")
        assert Image.open(folder / "pr_curve_box.png").width > 700
        # A COCO file alone has no images that could be drawn.
        assert ('<figure class="sides">' in (folder / "evaluation.html").read_text()) == (truth[0] == "--shards")


def test_a_set_as_lvis_writes_it_is_scored_by_its_metric(trained, scenes, tmp_path):
    """No file names, but addresses; what each image was looked through for; how frequent a class is."""
    truth = json.loads(scenes.val.read_text())
    kinds = ("r", "c", "f")
    classes = [category | {"frequency": kinds[n % 3]} for n, category in enumerate(truth["categories"])]
    absent = {category["id"] for category in classes[:5]}
    images = []
    for image in truth["images"]:
        there = {one["category_id"] for one in truth["annotations"] if one["image_id"] == image["id"]}
        address = {"coco_url": f"http://images.example/val2017/{image['file_name']}"}
        looked = {"neg_category_ids": sorted(absent - there), "not_exhaustive_category_ids": []}
        images.append({key: image[key] for key in ("id", "width", "height")} | address | looked)
    file, folder = tmp_path / "lvis.json", tmp_path / "images" / "val2017"
    file.write_text(json.dumps(truth | {"images": images, "categories": classes}))
    shutil.copytree(scenes.images, folder)
    asked = ("--coco", file, "--metric", "lvis", "--out")
    out, again = tmp_path / "out", tmp_path / "again"
    succeeded(piip_scale("evaluate", trained, "--images", folder.parent, *asked, out))
    succeeded(piip_scale("evaluate", "--results", out / "predictions.json", *asked, again))
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"box_ap_rare", "box_ap_common", "box_ap_frequent", "mask_ap_rare"} <= metrics.keys()
    assert json.loads((again / "metrics.json").read_text()) == pytest.approx(metrics, abs=1e-12)


def test_results_that_are_none_are_one_line(scenes, tmp_path):
    results = tmp_path / "results.json"
    entry = {"image_id": json.loads(scenes.val.read_text())["images"][0]["id"], "category_id": 1, "score": 0.5}
    for content, message in (
        ("[", "are not JSON"),
        ("{}", "are no list"),
        ([entry | {"image_id": 99999}], "the set has no such image"),
        ([entry | {"category_id": 99}], "the set has no such category"),
        ([entry | {"image_id": [1]}], "the set has no such image"),
        ([entry], "with a score or box that is none"),
        ([entry | {"bbox": [1, 1, 5, 5], "score": math.nan}], "with a score or box that is none"),
        ([entry | {"bbox": [1, 1, 5, math.inf]}], "with a score or box that is none"),
    ):
        results.write_text(content if isinstance(content, str) else json.dumps(content))
        assert message in refused("--results", results, "--coco", scenes.val)
    results.write_text("[]")
    assert "has no neg_category_ids" in refused("--results", results, "--coco", scenes.val, "--metric", "lvis")
    assert "come without a set" in refused("--results", results)
    assert "no model is named" in refused()
