"""The way from label maps to a picture, by the commands a user types."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from commands import piip_scale, succeeded
from PIL import Image

from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.data.packing.coco_maps import write_label_maps
from piip_scale.data.packing.pack_maps import pack_label_maps

CONFIG = """
task = "segmentation"
model = dict(
    branches=[
        dict(resolution_px=32, embed_dim=64, depth=2, num_heads=4, patch_size_px=8, pretrain_resolution_px=32),
        dict(resolution_px=64, embed_dim=32, depth=2, num_heads=4, patch_size_px=8, pretrain_resolution_px=64),
    ],
    interaction=dict(num_stages=2, num_heads=4, gamma_init=0.1, drop_path_rate=0.1),
    pyramid=dict(scales=(2.0, 1.0, 0.5)),
)
segmentor = dict(
    overrides=dict(decode_head=dict(channels=16), auxiliary_head=dict(channels=16)),
    inference=dict(mode="slide", crop_px=(64, 64), stride_px=(48, 48)),
)
data = dict(
    train_shards="{shards}/train",
    val_shards="{shards}/val",
    augment=dict(short_edge_px=64, max_edge_px=128, crop_px=(64, 64), scale_range=(1.0, 1.0)),
    micro_batch_size=2,
    num_streams=2,
    workers=1,
)
optimizer = dict(lr=1e-2, clip_grad_norm=1.0)
schedule = dict(kind="poly", warmup_steps=2)
train = dict(steps=20, precision="{precision}", log_every_steps=2, evaluate_every_steps=20, checkpoint_every_steps=16)
"""


@pytest.fixture(scope="module")
def maps(scenes, tmp_path_factory):
    """Digits on photographs as classes of pixels."""
    folder, names = tmp_path_factory.mktemp("maps"), ()
    for split, source in (("train", scenes.train), ("val", scenes.val)):
        names = write_label_maps(source, scenes.images, folder / split)
        pack_label_maps(
            folder / split / "images", folder / split / "label_maps", folder / "shards" / split, classes=names
        )
    assert names == ("background", *"0123456789")
    return folder


@pytest.fixture(scope="module", params=["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def trained(request, maps, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = folder / "tiny.py"
    config.write_text(CONFIG.replace("{shards}", str(maps / "shards")).replace("{precision}", request.param))
    succeeded(piip_scale("train", config, "--procs", 2, "--run-dir", folder / "run"))
    succeeded(piip_scale("convert", folder / "run", folder / "weights.safetensors"))
    return folder


def test_training_lowers_the_loss_and_converted_weights_score_what_it_measured(trained, tmp_path):
    lines = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/total"] for line in lines if line["kind"] == "step"]
    assert losses[-1] < 0.9 * losses[0]
    measured = next(line for line in lines if line["kind"] == "evaluation")
    assert measured["eval/aacc"] > 0.5
    config, weights = trained / "run" / "config.py", trained / "weights.safetensors"
    out, listing = tmp_path / "scores", tmp_path / "areas.json"
    succeeded(piip_scale("evaluate", config, weights, "--out", out, "--predictions", listing))
    # Half of six images are the best, half the worst, each with the truth beside it.
    assert (out / "evaluation.html").read_text().count("<img") == 12
    for name, value in json.loads((out / "metrics.json").read_text()).items():
        # Weights are bfloat16 where they were measured, float32 where they are converted.
        assert value == pytest.approx(measured[f"eval/{name}"], abs=1e-4 if "fp32" in trained.name else 0.03), name
    entries = json.loads(listing.read_text())
    assert len(entries) == 6
    assert all(sum(one["area_share"] for one in entry["classes"]) == pytest.approx(1) for entry in entries)


def told(run_dir):
    """What each line from step 17 on says that does not depend on the machine."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {
        (line["kind"], line["step"], key): value
        for line in lines
        for key, value in line.items()
        if line["step"] > 16 and key.startswith(("loss/", "train/", "eval/"))
    }


def test_a_run_that_lost_its_last_steps_is_resumed_bit_for_bit(trained, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(trained / "run", broken)
    shutil.rmtree(broken / "checkpoints" / "step_00000020")
    (broken / "metrics.jsonl").unlink()
    succeeded(piip_scale("train", trained / "tiny.py", "--procs", 2, "--run-dir", broken, "--resume"))
    assert len({step for _, step, _ in told(broken)}) == 2
    assert told(broken) == told(trained / "run")
    found, wanted = (ZeroCheckpoint(run / "checkpoints" / "step_00000020") for run in (broken, trained / "run"))
    # Batch norms' running statistics, too.
    assert any(weight.is_buffer and "running_var" in name for name, weight in wanted.weights.items())
    assert found.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


def test_prediction_is_drawn_and_listed(trained, scenes, tmp_path):
    photos = sorted(scenes.images.glob("val_*.jpg"))[:2]
    picture, listing = tmp_path / "found.png", tmp_path / "found.json"
    config, weights = trained / "run" / "config.py", trained / "weights.safetensors"
    done = succeeded(piip_scale("predict", config, weights, *photos, "--out", picture, "--json", listing))
    assert "background" in done.stdout
    assert Image.open(picture).width > 2 * 600
    entries = json.loads(listing.read_text())
    assert [entry["image"] for entry in entries] == [str(path) for path in photos]
    assert all(sum(one["area_share"] for one in entry["classes"]) == pytest.approx(1) for entry in entries)


def test_shards_of_another_task_are_refused(maps, shards, tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG.replace("{shards}", str(maps / "shards")).replace("{precision}", "fp32"))
    done = piip_scale("train", config, "--run-dir", tmp_path / "run", f"--set=data.train_shards={shards / 'train'}")
    assert done.returncode == 2
    assert "are packed for detection" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
