"""The demo, on a set of the user's own and as short as it gets."""

from __future__ import annotations

import json

import pytest
from commands import failed_in_one_line, piip_scale, succeeded

SHORT = ["--set", "train.steps=2", "--set", "train.evaluate_every_steps=0", "--set", "train.log_every_steps=1"]


@pytest.fixture(scope="module")
def shown(scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    first = succeeded(piip_scale("demo", "--data", scenes.train.parent, "--out", out, *SHORT))
    return out, first.stdout


def test_demo_ends_with_results_and_what_to_try_next(shown):
    out, told = shown
    assert "box AP / AP50" in told
    assert "mask AP / AP50" in told
    commands = told.split("Three commands to try next:")[1].strip().splitlines()
    assert len(commands) == 3
    for name in ("weights.safetensors", "metrics.json", "detections.png", "run/tensorboard", "shards/train"):
        assert (out / name).exists(), name


def test_a_second_demo_reuses_what_stands(shown, scenes):
    out, _ = shown
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = succeeded(piip_scale("demo", "--data", scenes.train.parent, "--out", out, *SHORT))
    assert "done before, 2 steps" in again.stdout
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed <= {"detections.png"}


def test_another_config_is_not_mixed_with_a_finished_demo(shown, scenes):
    out, _ = shown
    done = piip_scale("demo", "--data", scenes.train.parent, "--out", out, "--set", "train.steps=3")
    failed_in_one_line(done, "run of another config", "--out", code=1)


def test_one_json_is_split_by_image(scenes, tmp_path):
    words = ["--data", scenes.val, "--images", scenes.images, "--out", tmp_path, "--set", "data.micro_batch_size=2"]
    done = succeeded(piip_scale("demo", *words, "--boxes-only", *SHORT))
    assert "box AP / AP50" in done.stdout
    assert "mask AP" not in done.stdout
    names = [
        {image["file_name"] for image in json.loads(path.read_text())["images"]}
        for path in sorted((tmp_path / "data").glob("*.json"))
    ]
    assert len(names) == 2
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 6


def test_data_that_is_not_there_is_one_line(tmp_path):
    failed_in_one_line(piip_scale("demo", "--data", tmp_path / "absent.json"), "absent.json", "COCO JSON")
