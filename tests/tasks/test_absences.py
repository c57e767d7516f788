"""What is no score is said to be none."""

import math

import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from piip_scale.cli import evaluation
from piip_scale.cli.app import app
from piip_scale.tasks.absences import absences


def test_sizes_and_classes_without_objects_are_named():
    metrics = {"box_ap": 0.5, "box_ap_s": -1.0, "per_class/box_ap50/a/b": -1.0, "per_class/mask_ap50/a/b": -1.0}
    sizes, classes = absences(metrics | {"per_class/box_ap50/c": 0.0})
    assert sizes.startswith("box_ap_s: -1 or nan is no score")
    assert classes.endswith("1 class(es) without objects in this set, left out of the means: a/b")
    assert absences({"top1_accuracy": 0.0}) == []
    assert absences({"miou": math.nan})[0].startswith("miou:")


def test_an_evaluation_names_them_and_writes_whatever_a_terminal_cannot_show(tmp_path, monkeypatch):
    metrics = {"miou": 0.25, "per_class/iou/[wild]": 0.25, "per_class/iou/half \udc80": -1.0}
    monkeypatch.setattr(evaluation, "evaluate_model", lambda *_: metrics)
    config = tmp_path / "run.py"
    config.write_text(
        "detector = dict(kind='faster_rcnn')\ndata = dict(train_shards='t', val_shards='v')\n"
        "train = dict(steps=1)\nmodel = dict("
        "branches=[dict(resolution_px=64, embed_dim=32, depth=1, num_heads=2)], pyramid=dict(scales=(1.0,)))\n"
    )
    out, weights = tmp_path / "metrics.json", tmp_path / "w.safetensors"
    save_file({"weight": torch.zeros(1)}, weights)
    done = CliRunner().invoke(app, ["evaluate", str(config), str(weights), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "[wild]" in done.output
    assert "left out of the means: half \\udc80" in done.output
    assert out.is_file()
