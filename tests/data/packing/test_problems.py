"""Problems of an input: all at once, in a file where asked, left out where asked and then counted."""

import json
import os

import numpy as np
import PIL.Image
import pytest
from made_sets import make_coco, make_maps, write_jpeg
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.packing.pack_classes import pack_folders
from piip_scale.data.packing.pack_maps import pack_label_maps
from piip_scale.data.packing.packing import PackOptions
from piip_scale.data.packing.problems import ProblemsError
from piip_scale.data.packing.verify import verify_shards
from piip_scale.data.reading.shards import ShardSet
from piip_scale.errors import DataError


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def broken_set(tmp_path):
    """Ten images: 3 is gone, 5 and 6 are damaged, an annotation of 1 sticks out, one is of no image."""
    annotations, images = make_coco(tmp_path, 10)
    root = json.loads(annotations.read_text())
    (images / "3.jpg").unlink()
    for number in (5, 6):
        (images / f"{number}.jpg").write_bytes((images / f"{number}.jpg").read_bytes()[:300])
    root["annotations"][0]["bbox"] = [60, 40, 900, 30]
    root["annotations"].append({"id": 99, "image_id": 7777, "category_id": 7, "bbox": [1, 1, 9, 9]})
    annotations.write_text(json.dumps(root))
    return annotations, images


@pytest.mark.parametrize("workers", [1, 2])
def test_all_problems_come_at_once(broken_set, tmp_path, workers):
    report = tmp_path / "report.txt"
    with pytest.raises(ProblemsError) as caught:
        pack_coco(*broken_set, tmp_path / "out", target_samples=3, workers=workers, report=report)
    lines = report.read_text().splitlines()
    assert tuple(lines) == caught.value.lines
    assert len(lines) == 5
    for part in ("3.jpg", "5.jpg", "6.jpg", "annotation 0", "annotation 99"):
        assert sum(part in line for line in lines) == 1
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_samples_are_left_out_where_asked(broken_set, tmp_path, workers):
    options = {"target_samples": 3, "skip_broken": True, "report": tmp_path / "report.txt"}
    manifest = pack_coco(*broken_set, tmp_path / "out", workers=workers, **options)
    shards = ShardSet.open(tmp_path / "out")
    assert shards.image_ids.tolist() == [100, 101, 102, 104, 107, 108, 109]
    assert (manifest.made_with["num_skipped_images"], manifest.made_with["num_skipped_annotations"]) == (3, 2)
    notes = [note for number in range(7) for note in shards.notes(number)["annotations"]]
    assert manifest.num_annotations == len(notes) == manifest.targets.num_trainable
    report = verify_shards(tmp_path / "out", workers=1)
    assert (report.problems, report.targets) == ((), manifest.targets)
    whole = contents(tmp_path / "out")
    assert pack_coco(*broken_set, tmp_path / "out", workers=1, **options) == manifest
    assert contents(tmp_path / "out") == whole
    assert len((tmp_path / "report.txt").read_text().splitlines()) == 5
    # A set with holes is never taken for a whole one.
    with pytest.raises(DataError):
        pack_coco(*broken_set, tmp_path / "out", target_samples=3)
    os.remove(tmp_path / "out" / "manifest.json")
    assert pack_coco(*broken_set, tmp_path / "out", workers=workers, **options) == manifest
    assert contents(tmp_path / "out") == whole


def test_nothing_left_is_an_error(tmp_path):
    annotations, images = make_coco(tmp_path, 3)
    for path in images.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="must be images"):
        pack_coco(annotations, images, tmp_path / "out", skip_broken=True)
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="must be images"):
        pack_coco(annotations, images, tmp_path / "out", skip_broken=True)


def test_damaged_images_of_folders_and_maps_come_at_once(tmp_path):
    for number in range(4):
        write_jpeg(tmp_path / "f" / "cat" / f"{number}.jpg", 40, 40, number)
    for number in (1, 2):
        (tmp_path / "f" / "cat" / f"{number}.jpg").write_bytes(b"\xff\xd8 no")
    (tmp_path / "f" / "cat" / "notes.txt").write_text("x")
    with pytest.raises(ProblemsError) as caught:
        pack_folders(tmp_path / "f", tmp_path / "out")
    assert len(caught.value.lines) == 3
    made = pack_folders(tmp_path / "f", tmp_path / "out", how=PackOptions(skip_broken=True))
    assert (made.num_samples, made.targets.trainable) == (2, (2,))

    images, maps = make_maps(tmp_path / "m")
    PIL.Image.fromarray(np.full((42, 56), 9, np.uint8)).save(maps / "scene0" / "photo_2.png")
    (images / "scene1" / "photo_3.jpg").write_bytes(b"")
    (images / "scene1" / "photo_5.jpg").unlink()
    names = ["a", "b", "c", "d"]
    with pytest.raises(ProblemsError) as caught:
        pack_label_maps(images, maps, tmp_path / "maps", classes=names)
    assert len(caught.value.lines) == 3
    made = pack_label_maps(images, maps, tmp_path / "maps", classes=names, how=PackOptions(skip_broken=True))
    assert made.num_samples == 3
    assert verify_shards(tmp_path / "maps", workers=1).targets == made.targets


def test_the_command_shows_the_first_ten(tmp_path):
    annotations, images = make_coco(tmp_path, 14)
    for number in range(12):
        (images / f"{number}.jpg").unlink()
    words = ["shards", "pack", "coco", annotations, "--images", images, "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.output.count("is not there") == 10
    assert "12 problems" in result.exception.line
    assert "--report FILE takes all 12" in result.exception.line
    result = CliRunner().invoke(app, [*map(str, words), "--skip-broken"])
    assert result.exit_code == 0
    assert "2 images" in result.output
