"""A detector's training that is killed goes on as if it had not been."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from commands import piip_scale, succeeded
from opened_sets import assert_opened_once
from save_killer import SaveKiller
from sections.file_operations import log_operations, logged_operations

from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.cli.train import check_start, run_training
from piip_scale.config import load_config
from piip_scale.data.reading.opened import OpenedSets
from piip_scale.errors import CheckpointError
from piip_scale.tasks.classes import with_classes
from piip_scale.world import World

STEPS = 9
# Everything that draws random numbers: drop path, augmentation, the order of the images and which come again, mmdet's
# samplers; and in bf16.
SETTINGS = {
    "train.precision": "'bf16'",
    "train.steps": STEPS,
    "train.log_every_steps": 1,
    "train.checkpoint_every_steps": 3,
    "train.evaluate_every_steps": 0,
    "model.branches.0.drop_path_rate": 0.4,
    "model.branches.1.drop_path_rate": 0.2,
    "data.augment.jitter_scale": "(0.5, 1.5)",
    "data.augment.crop_px": "(64, 64)",
    "data.sampling": "{'kind': 'repeat_factor', 'threshold': 1.0}",
}


def words(config, run_dir):
    overrides = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    return ["train", config, "--procs", 2, "--run-dir", run_dir, *overrides]


def train_and_kill(config, run_dir):
    """A rank is killed outright in the second save."""
    done = piip_scale(*words(config, run_dir), preexec_fn=partial(SaveKiller, "half written", 6, rank=1))
    assert done.returncode == 1
    assert "rank 1 was killed by SIGKILL" in done.stderr
    store = CheckpointStore(run_dir / "checkpoints", keep=2)
    assert store.latest() == store.path(3)


def told(run_dir):
    """What each step's line says that does not depend on the machine."""
    path = run_dir / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {
        line["step"]: {key: value for key, value in line.items() if key.startswith(("loss/", "train/"))}
        for line in lines
        if line["kind"] == "step"
    }


def moments(checkpoint):
    """Adam's moments and counters, by file, group and name."""
    found = {}
    for file in checkpoint.rglob("*optim_states.pt"):
        groups = torch.load(file, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]["state"]
        for group, state in groups.items():
            found |= {(file.name, group, name): value for name, value in state.items()}
    return found


def test_a_detector_killed_in_the_middle_is_bit_for_bit_the_whole_run(config, shards, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeeded(piip_scale(*words(config, whole)))
    train_and_kill(config, broken)
    noted = partial(log_operations, shards, log := tmp_path / "operations.txt")
    succeeded(piip_scale(*words(config, broken), "--resume", preexec_fn=noted))
    assert len(told(whole)) == STEPS
    assert told(broken) == told(whole)
    wanted, found = (CheckpointStore(run / "checkpoints", keep=2).latest() for run in (whole, broken))
    assert wanted.name == found.name == f"step_{STEPS:08d}"
    for kind in (lambda path: dict(ZeroCheckpoint(path)), moments):
        ours, theirs = kind(found), kind(wanted)
        assert ours.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert any("exp_avg_sq" in name for name in moments(found))
    assert_opened_once(logged_operations(log).values(), [shards / "train", shards / "val"], num_processes=3)


def test_a_run_that_lost_its_checkpoints_starts_nothing(config, trained, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    for damaged in (run_dir / "checkpoints").glob("step_*/manifest.json"):
        damaged.unlink()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"none of them is whole.*--restart"):
        run_training(config, [], run_dir, procs=2, resume=True)
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match=r"none of them is whole here: status.json.*step 6"):
        run_training(config, [], run_dir, procs=2, resume=True)
    assert {path: path.read_bytes() for path in before if path.exists()}.items() <= before.items()
    sets = OpenedSets()
    check_start(with_classes(load_config(config), sets), run_dir, World(), sets, resume=False, restart=True)
