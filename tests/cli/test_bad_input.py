"""What goes wrong is told in one line, ends with an error code, and leaves nothing that looks whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest
from commands import failed_in_one_line, piip_scale, started, succeeded
from damaged import damage

from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.reading.shards import ShardSet

NOTES = {
    "images": [{"id": 7, "file_name": "a.jpg", "width": 64, "height": 64}],
    "annotations": [{"id": 3, "image_id": 7, "category_id": 1, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}],
    "categories": [{"id": 1, "name": "digit"}],
}


@pytest.fixture
def data(tmp_path, scenes):
    """A set of one image, which a test then damages."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.jpg").write_bytes(next(scenes.images.glob("train_*.jpg")).read_bytes())
    (tmp_path / "notes.json").write_text(json.dumps(NOTES))
    return tmp_path


def pack(data, *more):
    return piip_scale(
        "shards", "pack", "coco", data / "notes.json", "--images", data / "images", "--out", data / "out", *more
    )


def change(data, where, **values):
    notes = json.loads((data / "notes.json").read_text())
    notes[where][0] |= values
    (data / "notes.json").write_text(json.dumps(notes))


def spoil_missing_file(data):
    (data / "notes.json").unlink()


def spoil_empty_file(data):
    (data / "notes.json").write_text("")


def spoil_no_images(data):
    (data / "notes.json").write_text(json.dumps(NOTES | {"images": [], "annotations": []}))


def spoil_absent_image(data):
    (data / "images" / "a.jpg").unlink()


def spoil_truncated_image(data):
    content = (data / "images" / "a.jpg").read_bytes()
    (data / "images" / "a.jpg").write_bytes(content[: len(content) // 2])


def spoil_box_outside(data):
    change(data, "annotations", bbox=[50, 50, 40, 10])


def spoil_category(data):
    change(data, "annotations", category_id=99)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (spoil_missing_file, ["notes.json"]),
        (spoil_empty_file, ["notes.json", "empty"]),
        (spoil_no_images, ["notes.json", "images"]),
        (spoil_absent_image, ["a.jpg"]),
        (spoil_truncated_image, ["a.jpg"]),
        (spoil_box_outside, ["annotation", "3", "outside"]),
        (spoil_category, ["category", "99"]),
    ],
)
def test_a_damaged_set_is_not_packed(data, spoil, parts):
    spoil(data)
    failed_in_one_line(pack(data), *parts)
    assert not (data / "out" / "manifest.json").exists()


def test_an_undamaged_set_is_packed(data):
    succeeded(pack(data))
    assert (data / "out" / "manifest.json").exists()


def test_a_full_disk_stops_packing(scenes, small_disk):
    disk = small_disk(32 * 1024)
    done = piip_scale("shards", "pack", "coco", scenes.train, "--images", scenes.images, "--out", disk / "out")
    failed_in_one_line(done, "No space left", "free some space")
    assert not (disk / "out" / "manifest.json").exists()
    assert not list((disk / "out").glob("shard-*.tar"))


def test_a_full_disk_stops_training(config, small_disk):
    disk = small_disk(600 * 1024)
    done = piip_scale("train", config, "--procs", 2, "--run-dir", disk / "run", "--set", "train.evaluate_every_steps=0")
    failed_in_one_line(done, "free", code=done.returncode)
    assert done.returncode in (1, 2)
    assert CheckpointStore(disk / "run" / "checkpoints", keep=2).latest() is None


def test_a_full_disk_stops_converting(trained, small_disk):
    disk = small_disk(64 * 1024)
    failed_in_one_line(piip_scale("convert", trained, disk / "w.safetensors"), "No space left", "w.safetensors")
    assert list(disk.iterdir()) == []


def test_a_used_run_directory_is_not_trained_into(config, trained):
    before = (trained / "metrics.jsonl").read_bytes()
    done = piip_scale("train", config, "--procs", 2, "--run-dir", trained)
    failed_in_one_line(done, str(trained), "done at step 6", "--resume", code=1)
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_resuming_nothing_is_refused(config, tmp_path):
    done = piip_scale("train", config, "--procs", 2, "--run-dir", tmp_path / "run", "--resume")
    failed_in_one_line(done, "no run to resume", "--resume", code=1)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepz=3", ["train.stepz", "did you mean steps"]),
        ("model.branches.0.num_heads=5", ["num_heads=5 must divide embed_dim=64"]),
        ("data.train_shards=/nowhere", ["/nowhere", "shards pack"]),
        ("data.classes=('cat','dog')", ["classes", "cat"]),
        ("detector.overrides.neck.out_chanels=3", ["out_chanels"]),
        ("zero.node_partition=3", ["zero.node_partition", "divides the 2 ranks"]),
        ("zero.deepspeed.steps_per_prnt=3", ["zero.deepspeed.steps_per_prnt", "did you mean steps_per_print?"]),
        ("train.images_per_step=3", ["3 images of train.images_per_step", "multiple of 2", "take 1 or 3 ranks or"]),
        ("data.micro_batch_size=50", ["16 images", "data.micro_batch_size"]),
    ],
)
def test_an_impossible_config_starts_nothing(config, tmp_path, override, parts):
    done = piip_scale("train", config, "--procs", 2, "--run-dir", tmp_path / "run", "--set", override)
    failed_in_one_line(done, *parts)
    assert not (tmp_path / "run" / "status.json").exists()


def test_ctrl_c_saves_and_resume_finishes(config, tmp_path):
    run_dir = tmp_path / "run"
    words = ["train", config, "--procs", 2, "--run-dir", run_dir, "--set", "train.evaluate_every_steps=0"]
    process = started(*words, "--set", "train.steps=4000")
    wait_for_steps(run_dir, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "stopped as asked after step" in told
    assert "--resume" in told
    assert "Traceback" not in told
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "stopped"
    latest = CheckpointStore(run_dir / "checkpoints", keep=2).latest()
    assert int(latest.name.removeprefix("step_")) == status["step"]
    succeeded(piip_scale(*words, "--set", f"train.steps={status['step'] + 2}", "--resume"))
    assert json.loads((run_dir / "status.json").read_text())["step"] == status["step"] + 2


def wait_for_steps(run_dir, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not (run_dir / "metrics.jsonl").exists() or '"kind": "step"' not in (run_dir / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no step within two minutes"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["predict", "{config}", "{weights}", "absent.jpg"], ["absent.jpg"]),
        (["predict", "{config}", "{weights}", "{truncated}"], ["broken.jpg"]),
        (["predict", "{config}", "absent.safetensors", "{photo}"], ["absent.safetensors", "convert"]),
        (["predict", "{config}", "{weights}", "{truncated}", "--out", "found.gif"], ["found.gif", ".png"]),
        (["evaluate", "{config}", "{weights}", "--shards", "/nowhere"], ["/nowhere"]),
        (["evaluate", "{config}", "{weights}", "--out", "{below a file}"], ["Not a directory"]),
        (
            ["evaluate", "{config}", "{weights}", "--set", "model.branches.0.depth=4"],
            ["missing", "branches.0.blocks.2"],
        ),
        (["convert", "/nowhere", "out.safetensors"], ["/nowhere"]),
        (["evaluate", "absent.py", "{weights}"], ["absent.py"]),
    ],
)
def test_wrong_files_are_named(trained, weights, scenes, tmp_path, words, parts):
    truncated = tmp_path / "broken.jpg"
    photo = next(scenes.images.glob("val_*.jpg"))
    content = photo.read_bytes()
    truncated.write_bytes(content[: len(content) // 3])
    names = {"{config}": trained / "config.py", "{weights}": weights, "{truncated}": truncated, "{photo}": photo}
    names["{below a file}"] = photo / "found"
    before = set(os.listdir())
    failed_in_one_line(piip_scale(*(names.get(word, word) for word in words)), *parts)
    assert set(os.listdir()) == before


def test_converting_never_replaces_unasked(trained, weights):
    content = weights.read_bytes()
    failed_in_one_line(piip_scale("convert", trained, weights), str(weights), "--overwrite")
    assert weights.read_bytes() == content


def test_a_broken_sample_is_told_once_in_a_run(shards, config, tmp_path):
    shutil.copytree(shards / "train", tmp_path / "train")
    damage(tmp_path / "train", 3)
    words = ["train", config, "--procs", 2, "--run-dir", tmp_path / "run", "--set", "data.max_broken_share=0.1"]
    words += ["--set", f"data.train_shards={tmp_path / 'train'}", "--set", "train.steps=8"]
    key = ShardSet.open(tmp_path / "train").keys[3]
    done = succeeded(piip_scale(*words))
    assert done.stderr.count("is replaced by a neighbour") == done.stderr.count(f"sample {key} is replaced") == 1
    assert key in next((tmp_path / "run" / "broken_samples").rglob("*.json")).read_text()
    # Two epochs: it came twice.
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["data/broken_samples"] for line in steps if line["kind"] == "step"][-1] == 2
    # A run that goes on does not tell of it again, and counts it all the same.
    stopped = piip_scale(*words, "--resume", "--set", "train.steps=12", "--set", "data.max_broken_share=0.05")
    failed_in_one_line(stopped, "too many broken samples", key, "got 1", "at most 0.8")
    assert "is replaced by a neighbour" not in stopped.stderr


def test_going_on_with_other_shards_is_told(shards, scenes, config, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    pack_coco(scenes.train, scenes.images, tmp_path / "repacked", target_samples=5, workers=1)
    words = ["--resume", "--set", f"data.train_shards={tmp_path / 'repacked'}", "--set", "train.steps=8"]
    done = succeeded(piip_scale("train", config, "--procs", 2, "--run-dir", tmp_path / "run", *words))
    ids = [ShardSet.open(folder).short_id for folder in (shards / "train", tmp_path / "repacked")]
    told = [line for line in done.stderr.splitlines() if "was trained on other shards" in line]
    assert len(told) == 1
    assert all(f"train {one}" in told[0] for one in ids)
