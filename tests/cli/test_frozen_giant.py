"""A frozen giant of DINOv3-7B's parts beside a small ConvNeXt, by a user's commands: trained, killed, resumed, used.

Slow; what it holds is held in seconds by ``tests/engine/test_frozen_training.py``, whose ranks are functions.
"""

from __future__ import annotations

import json
from functools import partial

import commands
import pytest
import timm
import torch
from commands import failed_in_one_line, piip_scale, succeeded
from safetensors.torch import load_file, save_file
from save_killer import SaveKiller

from piip_scale.checkpoint.zero_reader import ZeroCheckpoint

MODEL = """
model = dict(
    branches=[
        dict(
            preset="dinov3_7b", resolution_px=32, embed_dim=64, depth=4, num_heads=4, patch_size_px=8,
            frozen_blocks="all", frozen_dtype="int8", pretrained="{giant}",
        ),
        dict(
            preset="dinov3_convnext_tiny", resolution_px=64, depths=(1, 1, 3, 1), widths=(16, 32, 32, 64),
            blocks_per_stage=(1, 2, 4, 2), drop_path_rate=0.1, pretrained="{small}",
        ),
    ],
    interaction=dict(num_stages=4, num_heads=4, gamma_init=0.1, drop_path_rate=0.1, direction="to_small"),
    pyramid=dict(kind="regular", scales=(1.0, 1.0, 1.0), stages=(1, 2, 3)),
)
"""
STEPS = (
    "--set",
    "train.checkpoint_every_steps=2",
    "--set",
    "train.save_frozen=False",
    "--set",
    "train.precision='bf16'",
)


@pytest.fixture
def giant(tmp_path):
    return tmp_path / "giant.safetensors"


@pytest.fixture
def config(tmp_path, shards, giant):
    rest = commands.CONFIG[commands.CONFIG.index("detector =") :].replace("{shards}", str(shards))
    path = tmp_path / "frozen.py"
    small = tmp_path / "small.safetensors"
    path.write_text(MODEL.replace("{giant}", str(giant)).replace("{small}", str(small)) + rest)
    torch.manual_seed(4)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
    save_file(timm.create_model("vit_7b_patch16_dinov3", num_classes=0, **sizes).state_dict(), giant)
    convnext = timm.create_model("convnext_tiny", num_classes=0, depths=(1, 1, 3, 1), dims=(16, 32, 32, 64))
    save_file(convnext.state_dict(), small)
    return path


def training(config, run_dir, *options):
    return "train", config, "--procs", 2, "--run-dir", run_dir, *STEPS, *options


def last_losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return [{k: v for k, v in line.items() if k.startswith("loss/")} for line in lines if line["kind"] == "step"][-1]


@pytest.mark.slow
def test_it_trains_is_killed_resumes_bit_for_bit_converts_evaluates_and_predicts(config, giant, scenes, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    succeeded(piip_scale(*training(config, whole)))
    run = piip_scale(*training(config, killed), preexec_fn=partial(SaveKiller, "half written", 4, rank=1))
    assert "rank 1 was killed by SIGKILL" in run.stderr
    hidden = giant.rename(tmp_path / "elsewhere.safetensors")
    succeeded(piip_scale(*training(config, killed, "--resume", "--set", f"model.branches.0.pretrained='{hidden}'")))
    assert last_losses(killed) == last_losses(whole)
    found, wanted = (ZeroCheckpoint(run / "checkpoints" / "step_00000006") for run in (killed, whole))
    assert set(found) == set(wanted)
    assert not any(name.startswith("backbone.branches.0.") for name in found)
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name

    out = tmp_path / "whole.safetensors"
    failed_in_one_line(piip_scale("convert", whole, out), "model.branches.0.pretrained is not there", code=2)
    other = tmp_path / "other.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(hidden).items()}, other)
    failed_in_one_line(
        piip_scale("convert", whole, out, "--pretrained", other), "are not those that the checkpoint left", code=2
    )
    assert not out.exists()
    succeeded(piip_scale("convert", whole, out, "--pretrained", hidden, "--verify"))
    assert load_file(out)["backbone.branches.0.blocks.0.attn.qkv.weight"].dtype == torch.int8

    hidden.rename(giant)
    scores = [tmp_path / "converted.json", tmp_path / "run.json"]
    succeeded(piip_scale("evaluate", config, out, "--out", scores[0]))
    succeeded(piip_scale("evaluate", whole, "--out", scores[1]))
    assert scores[0].read_text() == scores[1].read_text()
    photo = next(scenes.images.glob("val_*.jpg"))
    succeeded(piip_scale("predict", config, out, photo, "--out", tmp_path / "found.png"))
    assert (tmp_path / "found.png").stat().st_size
