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
from piip_scale.config import loading

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
    assert lines[0].startswith("GiB on the GPU, micro-batches of ")
    assert any("which fits into 79.1" in line for line in lines)
    assert any("TFLOP an image" in line for line in lines)
    assert any(line.startswith("h100: ") for line in lines)
    assert lines[-1].startswith("fastest that fits: ")


def test_ctrl_c_in_any_command_is_one_line_and_exit_code_130(monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_config", interrupted)
    monkeypatch.setattr(sys, "argv", ["piip-scale", "plan", str(DIGITS)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert capsys.readouterr().err.split("\n") == ["piip-scale: stopped by Ctrl-C before it was done", ""]
