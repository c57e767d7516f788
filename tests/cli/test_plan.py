"""``piip-scale plan`` as a user runs it: no data, no weights, no GPU."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
from commands import piip_scale, succeeded
from opened_sets import assert_found_once
from sections.file_operations import log_operations, logged_operations

from piip_scale.cli.main import main

DIGITS = Path(__file__).parents[2] / "configs" / "demo" / "digits.py"


def test_a_plan_tells_memory_knobs_steps_and_time(shards, tmp_path):
    options = ("--nodes", 2, "--gpus-per-node", 2, "--gpu-memory-gib", 1, "--mfu", 0.5, "--peak-tflops", 100)
    options += ("--gpu", "h200", "--network-gbps", 200)
    sets = ("--set", f"data.train_shards={shards / 'train'}", "--set", f"data.val_shards={shards / 'val'}")
    noted = partial(log_operations, shards, log := tmp_path / "operations.txt")
    found = json.loads(succeeded(piip_scale("plan", DIGITS, *options, *sets, "--json", preexec_fn=noted)).stdout)
    (operations,) = logged_operations(log).values()
    assert_found_once(operations, [shards / "train", shards / "val"])
    assert (found["num_ranks"], found["fits"], found["capacity"]) == (4, False, 2**30)
    kinds = ("weights", "gradients", "masters", "moments", "activations")
    parts = sum(part[kind] for part in found["parts"] for kind in kinds)
    others = sum(found[kind] for kind in ("gathered", "buckets", "backward", "reserve"))
    assert found["total"] == pytest.approx(parts + others)
    # Libraries alone take more than this GPU has.
    assert not any(change["fits"] for change in found["changes"])
    assert {each["name"] for each in found["traffic"] if each["between"]} >= {"weights, forward", "gradients"}
    assert found["gpu"]["name"] == "h200"
    assert found["network_gbps_of_a_node"] == 200
    assert found["time"]["seconds"] > 0
    assert {"zero.stage=2", "zero.shard_over='node'"} <= {each["name"] for each in found["choices"]}
    assert found["fastest"] is None
    pace = found["pace"]
    assert pace["steps"] == 400
    assert pace["steps_per_epoch"] == 16 // found["images_per_step"]
    assert pace["seconds_per_step"] == pytest.approx(
        pace["flops_per_image"] * found["images_per_step"] / (4 * 0.5 * 100e12)
    )


def test_a_plan_is_a_table_and_a_verdict(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["piip-scale", "plan", str(DIGITS), "--gpus-per-node", "1", "--size", "128x128"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("MiB on the GPU, micro-batches of ")
    assert any("which fits into 79.1" in line for line in lines)
    assert any("GFLOP an image" in line for line in lines)
    assert any(line.startswith("h100: ") for line in lines)
    assert lines[-1].startswith("fastest that fits: ")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--gpu", "NVIDIA H200"], ["--gpu: got 'NVIDIA H200'", "did you mean h200?"]),
        (["--gpu", "mi300x"], ["--gpu: got 'mi300x'; one of h100-pcie", "say its memory with --gpu-memory-gib"]),
        (["--sweep", "1,2", "--nodes", "4"], ["--nodes: got 4; --sweep says the numbers of nodes"]),
        (["--sweep", "1,2", "--mfu", "0.4"], ["--mfu: got 0.4"]),
        (["--sweep", "1,2", "--png", "no/where.png"], ["--png: got 'no/where.png'; its folder exists"]),
        (["--peak-tflops", "100"], ["--peak-tflops: got 100", "add --mfu"]),
        (["--set", "zero.node_partition=3"], ["zero.node_partition: got 3", "take 8, or 1 for none"]),
        (["--set", "zero.shard_over=3"], ["zero.shard_over: got 3", "set it to node or all"]),
        (["--measured", "no.jsonl"], ["--measured: got 'no.jsonl'; there is no such file; record it on the GPU"]),
        (
            ["--gpu", "h100", "--measured", "h200.jsonl"],
            ["got 'h200'; a recording of the GPU that --gpu asks for, h100"],
        ),
        (["--set", "model.*.depth=2"], ["model.*.depth: got '*'; it stands for every entry of a list"]),
    ],
)
def test_what_cannot_be_planned_is_one_line_with_the_value_and_the_fix(monkeypatch, tmp_path, capsys, words, parts):
    recorded = {"section": "machine", "name": "what it is", "device": "NVIDIA H200"}
    (tmp_path / "h200.jsonl").write_text(json.dumps(recorded))
    monkeypatch.chdir(tmp_path)
    assert planned(monkeypatch, words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("piip-scale: error: ")
    assert [part for part in parts if part not in err] == []


@pytest.mark.parametrize("option", ["--network-gbps", "--gpu-memory-gib", "--host-memory-gib"])
@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf"])
def test_rates_and_sizes_are_finite_numbers_above_0(monkeypatch, capsys, option, value):
    assert planned(monkeypatch, [option, value]) == 2
    assert f"Invalid value for '{option}'" in capsys.readouterr().err


def test_a_schedule_in_epochs_is_as_long_as_the_images_it_is_told_of(monkeypatch, capsys):
    epochs = ["--set", "train.steps=None", "--set", "train.epochs=3", "--set", "data.train_shards=no"]
    assert planned(monkeypatch, [*epochs, "--epoch-images", "1000", "--mfu", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pace, images = found["pace"], found["images_per_step"]
    assert (pace["steps_per_epoch"], pace["steps"]) == (1000 // images, 3 * (1000 // images))
    # Without a peak of its own the speed asked for is a share of the GPU's.
    peak = found["gpu"]["tf32_tflops"] * 1e12
    assert pace["seconds_per_step"] == pytest.approx(pace["flops_per_image"] * images / (8 * 0.5 * peak))
    assert planned(monkeypatch, epochs) == 0
    assert "--epoch-images N" in capsys.readouterr().out


def test_a_sweep_is_a_table_a_picture_and_json(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert planned(monkeypatch, ["--sweep", "1,2", "--json"]) == 0
    out, err = capsys.readouterr()
    one, two = json.loads(out)
    assert (one["num_ranks"], two["nodes"], two["num_ranks"]) == (8, 2, 16)
    assert two["weak"]["images"] == 2 * one["weak"]["images"] == 2 * one["strong"]["images"]
    assert two["weak"]["fastest"]["seconds"] <= two["weak"]["written"]["seconds"]
    assert two["weak"]["written"]["layout"]["stage"] == 3
    assert err == "drawn in scaling.png\n"
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def planned(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["piip-scale", "plan", str(DIGITS), *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code
