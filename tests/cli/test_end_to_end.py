"""The way from shards to a picture, by the commands a user types."""

from __future__ import annotations

import gzip
import json
import re
import shutil

import pytest
import torch
from commands import failed_in_one_line, piip_scale, succeeded, without_slurm
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.config import load_config
from piip_scale.engine.profile_tables import OUTSIDE, RANGE

TAGS = {
    "loss/total",
    "loss/loss_cls",
    "loss/loss_bbox",
    "loss/loss_mask",
    "loss/loss_rpn_cls",
    "loss/loss_rpn_bbox",
    "train/lr",
    "train/grad_norm",
    "throughput/images_per_second",
    "time/step_ms",
    "time/data_wait_ms",
    "time/forward_ms",
    "time/backward_ms",
    "time/update_ms",
    "memory/peak_gib",
    "eval/box_ap",
    "eval/box_ap50",
    "eval/mask_ap",
}


def test_tensorboard_tells_the_run(trained):
    events = EventAccumulator(str(trained / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) >= TAGS
    assert [event.step for event in events.Scalars("loss/total")] == [2, 4, 6]
    for tag in ("loss/total", "throughput/images_per_second", "time/step_ms", "memory/peak_gib"):
        assert all(event.value > 0 for event in events.Scalars(tag)), tag
    assert [event.step for event in events.Scalars("eval/box_ap")] == [6]
    assert [event.step for event in events.Scalars("per_class/mask_ap50/7")] == [6]
    # Two ranks and six images: each picture once, whoever had its image.
    pictures = [tag for tag in events.Tags()["images"] if tag.startswith("truth_beside_found/")]
    assert len(pictures) == 4
    for tag in pictures:
        assert [(event.step, event.width, event.height) for event in events.Images(tag)] == [(6, 640, 320)]
    assert {"pr/box", "pr/mask", "pr_per_class/mask/7"} <= set(events.Tags()["tensors"])
    # What a step is made of adds up to it, and all parts of this one take time.
    parts, step = (("data_wait", "forward", "backward", "update"), events.Scalars("time/step_ms"))
    values = [[event.value for event in events.Scalars(f"time/{part}_ms")] for part in parts]
    assert [sum(each) for each in zip(*values, strict=True)] == pytest.approx([event.value for event in step], rel=1e-5)
    assert all(value > 0 for part in values[1:] for value in part)


def test_profiled_steps_end_before_a_save_and_leave_a_trace_and_tables(trained):
    # A checkpoint comes after step 4.
    names = {path.name for path in (trained / "profile").iterdir()}
    assert names == {f"steps_00000003-00000004{suffix}" for suffix in (".txt", ".pt.trace.json.gz")}
    (trace,) = (trained / "profile").glob("*.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep#") for event in events) == 2
    ranges = {event["name"].removeprefix(RANGE) for event in events if event["name"].startswith(RANGE)}
    assert any(".blocks." in name for name in ranges)
    verdict, modules, operators = (trained / "profile" / "steps_00000003-00000004.txt").read_text().split("\n\n")
    assert "the device is the CPU" in verdict
    # Which ten are dearest is up to the machine.
    names = [line.split(maxsplit=5)[-1] for line in modules.splitlines()[1:]]
    assert len(names) == len(set(names)) == len(operators.splitlines()[1:]) == 10
    assert set(names) <= {OUTSIDE, *ranges, *(re.sub(r"\.\d+$", ".*", name) for name in ranges)}


def test_run_directory_is_complete(trained):
    status = json.loads((trained / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 6)
    assert load_config(trained / "config.py").data.classes == tuple("0123456789")
    assert CheckpointStore(trained / "checkpoints", keep=2).latest().name == "step_00000006"
    assert "torch" in json.loads((trained / "environment.json").read_text())["libraries"]


def test_a_run_is_listed_where_there_is_no_slurm(trained):
    done = succeeded(without_slurm("jobs", "--runs", trained.parent))
    heads, line = done.stdout.splitlines()
    assert heads.split()[:5] == ["RUN", "STATE", "SEEN", "JOB", "STEP"]
    name, state, seen, *others = line.split()
    assert (name, state, *others[:2]) == (str(trained), "done", "-", "6/6")
    assert seen.endswith(("s", "m"))
    failed_in_one_line(without_slurm("jobs", "logs", trained), "has no job, and so no log", code=1)
    failed_in_one_line(without_slurm("jobs", "stop", trained), "got 'done at step 6'", code=1)
    failed_in_one_line(without_slurm("jobs", "requeue", trained), "is done, at step 6", code=1)


def test_checkpoint_is_sharded_over_both_ranks(trained):
    files = sorted(path.name for path in (trained / "checkpoints" / "step_00000006").rglob("*"))
    assert sum("optim_states" in name for name in files) == 2


def test_converted_weights_score_what_training_measured(trained, weights, tmp_path):
    succeeded(piip_scale("evaluate", trained / "config.py", weights, "--out", tmp_path / "metrics.json"))
    lines = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
    measured = next(line for line in lines if line["kind"] == "evaluation")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {f"eval/{name}" for name in metrics} == {name for name in measured if name.startswith("eval/")}
    for name, value in metrics.items():
        assert value == pytest.approx(measured[f"eval/{name}"], abs=1e-4), name


def train_on(run_dir, config, procs, *options):
    return succeeded(piip_scale("train", config, "--procs", procs, "--run-dir", run_dir, *options))


def assert_goes_on_alone(trained, config, run_dir, tolerance, *options):
    """What two processes trained to its end, resumed by one before the last steps, ends the same."""
    shutil.copytree(trained, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    done = train_on(run_dir, config, 1, "--resume", *options)
    assert "a step keeps its 4 images: micro-batches of 2" in done.stderr
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (trained, run_dir)]
    assert "resumed after step 4 (ranks before: 2, now: 1)" in str(lines[1])
    last = [[line for line in told if line["kind"] == "step"][-1] for told in lines]
    losses = [{key: value for key, value in step.items() if key.startswith("loss/")} for step in last]
    assert len(losses[0]) > 5
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    found, expected = (ZeroCheckpoint(run / "checkpoints" / "step_00000006") for run in (run_dir, trained))
    assert found.num_ranks == 1
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=tolerance, atol=tolerance)


def test_one_process_goes_on_where_two_were(trained, config, tmp_path):
    assert_goes_on_alone(trained, config, tmp_path / "run", 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_process_goes_on_in_bf16(config, tmp_path, stage):
    options = ("--set", "train.precision='bf16'", "--set", f"zero.stage={stage}")
    train_on(tmp_path / "whole", config, 2, *options)
    assert_goes_on_alone(tmp_path / "whole", config, tmp_path / "run", 1e-3, *options)


def test_converted_weights_are_whole_and_plain(weights):
    with safe_open(weights, framework="pt") as file:
        names = set(file.keys())
        assert file.metadata()["step"] == "6"
    assert any(name.startswith("backbone.branches.0.") for name in names)
    assert any(name.startswith("heads.") for name in names)


def test_averages_that_were_not_kept_are_one_line(trained, tmp_path):
    failed_in_one_line(
        piip_scale("convert", trained, tmp_path / "a.safetensors", "--ema"), "no files of averaged weights", "leave out"
    )


def test_prediction_is_drawn_and_listed(trained, weights, scenes, tmp_path):
    photos = sorted(scenes.images.glob("val_*.jpg"))[:3]
    picture, listing = tmp_path / "found.png", tmp_path / "found.json"
    done = succeeded(
        piip_scale(
            *("predict", trained / "config.py", weights, *photos, "--out", picture),
            *("--json", listing, "--score-threshold", 0.0),
        )
    )
    assert str(picture) in done.stdout
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 2 * 600
        assert len(set(image.resize((64, 64)).getdata())) > 100
    entries = json.loads(listing.read_text())
    assert [entry["image"] for entry in entries] == [str(path) for path in photos]
    for entry in entries:
        for found in entry["objects"]:
            left, top, right, bottom = found["box_xyxy_px"]
            assert 0 <= left <= right <= 64
            assert 0 <= top <= bottom <= 64


def test_packing_by_command_equals_packing_by_call(scenes, shards, tmp_path):
    done = succeeded(piip_scale("shards", "pack", "coco", scenes.val, "--images", scenes.images, "--out", tmp_path))
    assert "6 images" in done.stdout
    for made, packed in zip(sorted(tmp_path.glob("shard*")), sorted((shards / "val").glob("shard*")), strict=True):
        assert made.read_bytes() == packed.read_bytes()


def test_packing_takes_an_order_of_classes_and_a_size(scenes, tmp_path):
    order = [str(digit) for digit in reversed(range(10))]
    words = [word for name in order for word in ("--class", name)]
    done = piip_scale(
        *("shards", "pack", "coco", scenes.val, "--images", scenes.images, "--out", tmp_path),
        *("--target-samples", 4, *words),
    )
    assert "6 images" in succeeded(done).stdout
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [category["name"] for category in manifest["categories"]] == order
    assert [shard["num_samples"] for shard in manifest["shards"]] == [4, 2]


@pytest.mark.parametrize(
    "words", [(), ("train",), ("shards", "pack"), ("shards", "pack", "voc"), ("convert",), ("evaluate",), ("predict",)]
)
def test_help_teaches_by_example(words):
    done = succeeded(piip_scale(*words, "--help"))
    assert "piip-scale" in done.stdout.split("Options")[0]
    assert "--help" in done.stdout
