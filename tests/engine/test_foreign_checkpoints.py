"""A checkpoint of another version, model or run says what differs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import tiny_config

from piip_scale import __version__
from piip_scale.checkpoint.origin import STATE_FILE
from piip_scale.engine.checkpointing import TrainingState
from piip_scale.engine.resuming import Checkpoint, read_state, warn_of_other_sets
from piip_scale.engine.versions import STATE_FORMAT, versions, warn_of_other_versions
from piip_scale.errors import CheckpointError


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"versions": {"piip-scale": "0.0.1"}}, ["of format 1, written by piip-scale 0.0.1", "reads format"]),
        (
            {"format": STATE_FORMAT + 1},
            [f"of format {STATE_FORMAT + 1}", "of unknown version", f"-scale {__version__}"],
        ),
        ({"format": STATE_FORMAT, "step": 8}, ["cannot be read", "num_ranks"]),
        ([], ["cannot be read"]),
    ],
)
def test_a_description_that_this_version_does_not_read_is_named_with_its_writer(tmp_path, content, parts):
    (tmp_path / STATE_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path)
    for part in [str(tmp_path), *parts]:
        assert part in caught.value.line


def test_other_libraries_are_told_with_both_versions(caplog):
    warn_of_other_versions(Path("step_00000008"), versions())
    assert caplog.text == ""
    warn_of_other_versions(Path("step_00000008"), versions() | {"torch": "1.0"})
    assert f"torch 1.0 (here {torch.__version__.split('+')[0]}" in caplog.text
    assert "deepspeed" not in caplog.text


def test_other_shards_are_told_with_both(caplog):
    for before in ("train a, val b", ""):
        warn_of_other_sets(Path("step_00000008"), before, "train a, val b")
    assert caplog.text == ""
    warn_of_other_sets(Path("step_00000008"), "train a, val b", "train c, val b")
    assert "step_00000008 was trained on other shards (train a, val b; here train c, val b)" in caplog.text


STATE = TrainingState(
    step=8,
    num_ranks=2,
    stage=3,
    precision="bf16",
    images_per_step=8,
    steps_per_epoch=6,
    shapes={"head.weight": [4, 32], "head.bias": [4]},
    groups=[["head.weight"], ["head.bias"]],
    versions=versions(),
    config=tiny_config().model_dump(mode="json"),
)


def with_seed(seed: int) -> dict:
    return tiny_config(train={"seed": seed}).model_dump(mode="json")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"shapes": {"head.weight": [4, 32]}}, ["another model", "1 only in the checkpoint (head.bias)"]),
        ({"shapes": STATE.shapes | {"neck.bias": [1]}}, ["another model", "1 only in this model (neck.bias)"]),
        ({"shapes": STATE.shapes | {"head.bias": [5]}}, ["1 of another shape (head.bias [4] against [5])"]),
        ({"groups": [["head.weight", "head.bias"]]}, ["2 against 1", "weight_decay", "layer_decay"]),
        ({"groups": [["head.weight"]]}, ["1 trained in the checkpoint and frozen here (head.bias)", "frozen_blocks"]),
        ({"groups": [["head.weight", "stem.weight"], ["head.bias"]]}, ["1 frozen in the checkpoint and trained here"]),
        ({"precision": "fp32"}, ["train.precision 'bf16', this run has 'fp32'"]),
        ({"images_per_step": 16}, ["images a step 8, this run has 16"]),
        ({"config": with_seed(3)}, ["train.seed 0, this run has 3"]),
    ],
)
def test_what_differs_is_named(changes, parts):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(Path("step_00000008"), STATE).resume(None, replace(STATE, **changes))
    for part in ["step_00000008", *parts]:
        assert part in caught.value.line
