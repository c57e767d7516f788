"""A step that a run did not apply: what is kept of it, and the step again, alone."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import commands
import pytest

STEPS = 3
# The third step's loss is above 1.01 times the median of the two before it, and so not applied.
SETTINGS = (
    *(f"train.steps={STEPS}", "train.log_every_steps=1", "train.checkpoint_every_steps=1", "train.keep_checkpoints=9"),
    *("train.evaluate_every_steps=0", "train.gradient_accumulation=2", "data.workers=0", "optimizer.lr=1e-2"),
    *("train.max_loss_ratio=1.01", "train.loss_trend_steps=2", "schedule.warmup_steps=0"),
)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "jumpy"
    settings = [f"--set={setting}" for setting in SETTINGS]
    commands.succeeded(commands.piip_scale("train", config, "--procs", 2, "--run-dir", run_dir, *settings))
    return run_dir


def replay(run, *arguments):
    return commands.piip_scale("replay", run, *arguments)


def files(run):
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in run.rglob("*") if path.is_file()}


def replayed(output):
    """Keys by rank and micro-batch, losses as means by rank, and the gradient's norm."""
    keys, losses = {}, {}
    for line in output.splitlines():
        if head := re.match(r"rank (\d+), micro-batch (\d+): (.*); gradient norm", line):
            rank = int(head[1])
            own = keys.setdefault(rank, [])
            own.append([])
            for name, value in (part.rsplit(" ", 1) for part in head[3].split(", ")):
                losses.setdefault(rank, {}).setdefault(name, []).append(float(value))
        elif line.startswith("  "):
            own[-1].append(line.strip())
    means = {rank: {name: sum(v) / len(v) for name, v in named.items()} for rank, named in losses.items()}
    return [keys[rank] for rank in sorted(keys)], means, float(re.search(r"norm of the step: (\S+)", output)[1])


def test_a_step_that_was_not_applied_is_kept_and_is_the_same_again(run):
    (path,) = (run / "bad_steps").iterdir()
    kept = json.loads(path.read_text())
    assert (path.name, kept["step"], kept["checkpoint_step"]) == (f"step_{STEPS:08d}.json", STEPS, STEPS - 1)
    assert kept["config_sha256"] == hashlib.sha256((run / "config.py").read_bytes()).hexdigest()
    events = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "not applied" in line]
    assert len(events) == 1
    assert f"above train.max_loss_ratio's {kept['ranks'][0]['max_loss']:.4g}; see bad_steps/{path.name}" in events[0]
    before = files(run)
    output = commands.succeeded(replay(run, STEPS)).stdout
    assert files(run) == before
    assert f"the checkpoint of step {STEPS - 1}; 0 step(s) lie between" in output
    assert output.endswith("everything was finite\n")
    keys, losses, norm = replayed(output)
    assert keys == [rank["keys"] for rank in kept["ranks"]]
    assert norm > 0
    for rank, named in losses.items():
        assert named == pytest.approx(kept["ranks"][rank]["losses"], rel=1e-4)


def test_a_step_that_was_applied_has_the_losses_and_the_norm_it_had(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (logged,) = [line for line in lines if line["kind"] == "step" and line["step"] == 2]
    _, losses, norm = replayed(commands.succeeded(replay(run, 2)).stdout)
    assert norm == pytest.approx(logged["train/grad_norm"], rel=1e-4)
    for name in ("loss_cls", "loss_mask", "loss_rpn_bbox"):
        mean = sum(named[name] for named in losses.values()) / len(losses)
        assert mean == pytest.approx(logged[f"loss/{name}"], rel=1e-4)


def test_what_cannot_be_replayed_is_one_line(run, tmp_path):
    commands.failed_in_one_line(replay(tmp_path / "none", 3), "no run's directory", code=1)
    commands.failed_in_one_line(replay(run, 77), "step 77 is beyond", "tells of 3 step(s)", code=1)
    commands.failed_in_one_line(replay(run, 1), "no checkpoint before step 1", "of 1, 2, 3", "--checkpoint 1")
    commands.failed_in_one_line(replay(run, 3, "--checkpoint", 8), "no checkpoint of step 8", "1, 2, 3")
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("checkpoints"))
    commands.failed_in_one_line(replay(bare, 3), "no checkpoint before step 3", "no step", "checkpoint_every_steps")
    (bare / "bad_steps" / "step_00000003.json").write_text("{")
    commands.failed_in_one_line(replay(bare, 3), "step_00000003.json cannot be read", "move it away", code=1)
