"""``piip-scale predict``: a picture an image and results for other programs, whatever lies between the images."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import CONFIG
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import save_file
from typer.testing import CliRunner

import piip_scale
from piip_scale.cli.app import app
from piip_scale.cli.evaluation import Asked, Outputs, evaluate_model
from piip_scale.cli.predict import split_words
from piip_scale.config.loading import config_text, load_config
from piip_scale.errors import ConfigError, DataError, PiipError, WorldError
from piip_scale.tasks.kinds import build_model


@pytest.fixture(scope="module")
def files(shards, tmp_path_factory):
    """A config with its classes, and random weights that find ten objects in everything."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "tiny.py").write_text(CONFIG.replace("{shards}", str(shards)))
    config = load_config(folder / "tiny.py", [f"data.classes={tuple('0123456789')!r}"])
    (folder / "config.py").write_text(config_text(config))
    torch.manual_seed(0)
    save_file(build_model(config, 10).state_dict(), folder / "w.safetensors")
    return [str(folder / "config.py"), str(folder / "w.safetensors")]


@pytest.fixture(scope="module")
def photos(scenes):
    return sorted(map(str, scenes.images.glob("val_*.jpg")))


def predict(*words, text=None):
    return CliRunner().invoke(app, ["predict", *map(str, words)], input=text, catch_exceptions=False)


def test_a_folder_gets_a_picture_an_image_and_results_that_agree(files, photos, tmp_path):
    for place, photo in (("a/x.jpg", photos[0]), ("b/X.jpg", photos[1])):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_bytes(Path(photo).read_bytes())
    (tmp_path / "b" / "bomb.jpg").write_bytes(Path(photos[0]).read_bytes()[:500])
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"1 of 3 images .*bomb\.jpg") as caught:
        predict(*files, tmp_path / "a", "-", "--out", out, "--format", "json,csv,coco,yolo", text=f"{tmp_path / 'b'}\n")
    assert caught.value.exit_code == 1
    assert sorted(path.name for path in out.glob("*.png")) == ["X-2.png", "x.png"]
    with Image.open(out / "x.png") as picture:
        assert max(picture.size) == 640
    entries = json.loads((out / "results.json").read_text())
    assert [(entry["width_px"], entry["height_px"]) for entry in entries] == [(64, 64)] * 2
    rows = list(csv.DictReader((out / "results.csv").open()))
    results = json.loads((out / "coco_results.json").read_text())
    meaning = json.loads((out / "coco_images.json").read_text())
    ids = {image["file_name"]: image["id"] for image in meaning["images"]}
    labels = [line for stem in ("x", "X-2") for line in (out / "labels" / f"{stem}.txt").open()]
    objects = [(entry["image"], found) for entry in entries for found in entry["objects"]]
    assert len(objects) == len(rows) == len(results) == len(labels) == 20
    names = (out / "classes.txt").read_text().split()
    for (image, found), row, result, line in zip(objects, rows, results, labels, strict=True):
        left, top, right, bottom = found["box_xyxy_px"]
        assert (row["image"], row["class"], float(row["left_px"])) == (image, found["class"], left)
        assert result["image_id"] == ids[image]
        assert result["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=0.02)
        assert result["segmentation"] == found["mask_rle"]
        label, x, y, *_, score = line.split()
        assert (names[int(label)], float(score)) == (found["class"], pytest.approx(found["score"], abs=1e-3))
        assert (float(x) * 64, float(y) * 64) == pytest.approx(((left + right) / 2, (top + bottom) / 2), abs=0.02)


def test_coco_results_are_what_evaluation_finds_and_pycocotools_scores_alike(files, photos, scenes, tmp_path):
    words = ("--format", "coco", "--coco-ids", scenes.val, "--no-pictures", "--batch", 2)
    predict(*files, *photos, "--out", tmp_path / "out", *words)
    metrics = evaluate_model(Asked(*map(Path, files)), Outputs(tmp_path / "evaluated.json"))
    found = json.loads((tmp_path / "out" / "coco_results.json").read_text())

    def key(one):
        return one["image_id"], -one["score"], one["bbox"]

    assert sorted(found, key=key) == sorted(json.loads((tmp_path / "evaluated.json").read_text()), key=key)
    truth = COCO(str(scenes.val))
    for kind, part in (("bbox", "box"), ("segm", "mask")):
        scored = COCOeval(truth, truth.loadRes(str(tmp_path / "out" / "coco_results.json")), kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
        assert scored.stats[:3].tolist() == pytest.approx([metrics[f"{part}_ap{t}"] for t in ("", 50, 75)], abs=1e-9)


def test_a_batch_finds_what_one_by_one_does_whatever_the_sizes(files, photos, tmp_path):
    for number, photo in enumerate(photos[:4]):
        with Image.open(photo) as image:
            image.crop((0, 0, 64, 64 if number % 2 else 30)).save(tmp_path / f"{number}.png")
    found = []
    for batch in (1, 3):
        out = tmp_path / f"out{batch}"
        predict(*files, tmp_path / "*.png", "--out", out, "--no-pictures", "--batch", batch, "--threshold", 0)
        found.append(json.loads((out / "results.json").read_text()))
    for alone, together in zip(*found, strict=True):
        assert alone["image"] == together["image"]
        for one, other in zip(alone["objects"], together["objects"], strict=True):
            assert one["class"] == other["class"]
            assert one["box_xyxy_px"] == pytest.approx(other["box_xyxy_px"], abs=0.02)
            assert one["score"] == pytest.approx(other["score"], abs=2e-4)


def test_classes_scores_and_tiles_are_as_asked(files, photos, tmp_path):
    Image.fromarray(np.tile(np.asarray(Image.open(photos[0])), (2, 3, 1))).save(tmp_path / "large.png")
    words = (*files, tmp_path / "large.png", "--no-pictures", "--tile", 64, "--batch", 4)
    predict(*words, "--out", tmp_path / "all")
    (whole,) = json.loads((tmp_path / "all" / "results.json").read_text())
    name = whole["objects"][0]["class"]
    scores = [found["score"] for found in whole["objects"] if found["class"] == name]
    predict(*words, "--out", tmp_path / "some", "--classes", name, "--threshold", scores[0] - 1e-3)
    (some,) = json.loads((tmp_path / "some" / "results.json").read_text())
    assert 1 <= len(some["objects"]) <= len(scores)
    assert {found["class"] for found in some["objects"]} == {name}
    assert all(found["mask_rle"]["size"] == [128, 192] for found in whole["objects"])
    assert max(found["box_xyxy_px"][2] for found in whole["objects"]) > 128


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--classes", "cat"], "'cat'.*the model's are 0, 1"),
        (["--format", "xml"], "json, coco, csv, yolo"),
        (["--overlap", "1", "--tile", "9"], "--overlap"),
        (["--coco-ids", "absent.json", "--format", "coco"], "absent.json"),
        (["--json", "a.json"], "--json"),
    ],
)
def test_wishes_that_cannot_be_met_are_one_line(files, photos, tmp_path, words, part):
    with pytest.raises(PiipError, match=part):
        predict(*files, photos[0], "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_nothing_of_the_users_is_replaced_unasked(files, photos, tmp_path):
    sheet, folder = tmp_path / "sheet.png", tmp_path / "folder"
    folder.mkdir()
    photo = folder / "mine.png"
    for path in (sheet, photo):
        Image.open(photos[0]).save(path)
    before = photo.read_bytes()
    for out in (sheet, folder):
        with pytest.raises(DataError, match="is there already"):
            predict(*files, photos[0], "--out", out)
    with pytest.raises(DataError, match="holds the photograph"):
        predict(*files, photo, "--out", folder, "--overwrite")
    assert photo.read_bytes() == before
    assert predict(*files, photos[0], "--out", sheet, "--overwrite").exit_code == 0
    assert Image.open(sheet).width > 600


def test_where_nothing_can_be_read_nothing_is_written(files, tmp_path):
    with pytest.raises(DataError, match=r"2 of 2 images .*nowhere") as caught:
        predict(*files, tmp_path / "absent.jpg", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_weights_are_told_from_photographs(files, tmp_path):
    config, weights = map(Path, files)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").touch()
    folder = str(tmp_path / "weights")
    assert split_words(config, [str(weights), "a.jpg"]) == (weights, ["a.jpg"])
    assert split_words(tmp_path, ["a.jpg", "b"]) == (None, ["a.jpg", "b"])
    assert split_words(tmp_path, [folder, "a.jpg"]) == (Path(folder), ["a.jpg"])
    assert split_words(tmp_path, ["absent.safetensors", "-"]) == (Path("absent.safetensors"), ["-"])
    with pytest.raises(ConfigError, match="no photographs"):
        split_words(config, [str(weights)])


def test_devices_that_are_named_hold_the_model_and_change_nothing(files, photos, tmp_path):
    found = []
    for name, words in {"plain": (), "named": ("--devices", "cpu")}.items():
        file = tmp_path / f"{name}.json"
        asked = ["evaluate", *files, *words, "--precision", "bf16", "--predictions", str(file)]
        assert CliRunner().invoke(app, asked, catch_exceptions=False).exit_code == 0
        found.append(file.read_bytes())
    assert found[0] == found[1]
    assert predict(*files, photos[0], "--out", tmp_path / "out", "--no-pictures", "--devices", "cpu").exit_code == 0
    models = [piip_scale.load(*files, threshold=0.0, devices=devices) for devices in (None, ["cpu"])]
    entries = [{"image": photos[0]} | model.predict(photos[0]).values for model in models]
    assert [entries[0]] == [entries[1]] == json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.parametrize("command", ["evaluate", "predict", "serve"])
def test_spreading_that_cannot_be_is_one_line_and_starts_nothing(command, files, monkeypatch, photos):
    def refused(*words):
        inputs = photos[:1] if command == "predict" else []
        port = ["--port", "0"] if command == "serve" else []
        done = CliRunner().invoke(app, [command, *files, *inputs, *words, *port])
        assert isinstance(done.exception, WorldError)
        return done.exception.line

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "no GPU to spread over; this process sees none" in refused("--spread")
    assert "unknown device: got 'cuda:3'; this process has cpu" in refused("--devices", "cpu,cuda:3")
    # The others are done by rank 0 alone.
    if command == "evaluate":
        several = "got '2 processes'; one process spreads one model"
        assert f"--spread: {several}" in refused("--spread", "--procs", "2")
        ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
        for name, value in (ranks | {"MASTER_ADDR": "127.0.0.1"}).items():
            monkeypatch.setenv(name, value)
        assert f"--devices: {several}" in refused("--devices", "cpu")
