"""A run that lost its checkpoints does not begin again by itself, and whoever starts over loses nothing."""

import json
import logging

import pytest
from tiny_configs import tiny_config

from piip_scale.engine import resuming, worker
from piip_scale.engine.resuming import refuse_lost_checkpoints
from piip_scale.engine.stop import StopFlag
from piip_scale.errors import CheckpointError, RunError
from piip_scale.run.ending import Ending
from piip_scale.run.run_dir import RunDirectory


@pytest.fixture
def begun(tmp_path):
    """A run that died at step 40, before its first checkpoint."""
    run = RunDirectory(tmp_path / "run")
    run.open("model = 1\n", resume=False)
    run.write_status("failed", 40)
    (run.checkpoints / ".saving_00000050").mkdir(parents=True)
    run.metrics.write_text('{"step": 40, "kind": "step"}\n')
    return run


def dangling(run):
    for left in run.checkpoints.iterdir():
        left.rmdir()
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to(run.path / "scratch" / "gone")


def damaged(run):
    (run.checkpoints / "step_00000030").mkdir()


def dangling_checkpoint(run):
    (run.checkpoints / "step_00000030").symlink_to(run.path / "gone")


def only_latest(run):
    (run.checkpoints / "latest").write_text("step_00000030\n")


def noted(run):
    run.note_checkpoint(30)
    run.write_status("running", 41)


def stopped(run):
    run.write_status("stopped", 40)


def logged(run):
    run.metrics.write_text('{"step": 30, "kind": "checkpoint", "checkpoint/gib": 1}\n')


def superseded(run):
    run.superseded_metrics.write_text('{"step": 30, "kind": "checkpoint", "checkpoint/gib": 1}\n')


SIGNS = [dangling, damaged, dangling_checkpoint, only_latest, noted, stopped, logged, superseded]


def test_a_run_that_died_before_its_first_checkpoint_begins_at_step_1(begun):
    (begun.checkpoints / "lost+found").mkdir()
    refuse_lost_checkpoints(begun)
    begun.check(resume=True)


@pytest.mark.parametrize("sign", SIGNS)
def test_a_run_that_lost_its_checkpoints_is_refused_and_left_alone(begun, sign):
    sign(begun)
    before = contents(begun.path)
    with pytest.raises(CheckpointError, match=r"none of them is whole.*--restart") as caught:
        refuse_lost_checkpoints(begun)
    assert "\n" not in caught.value.line
    assert contents(begun.path) == before


@pytest.mark.parametrize("sign", [damaged, only_latest, logged])
def test_a_run_whose_status_is_gone_too_is_still_a_run(begun, sign):
    sign(begun)
    begun.status_file.unlink()
    with pytest.raises(RunError, match="holds a run"):
        begun.check(resume=False)
    begun.check(resume=True)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_starting_over_sets_everything_aside_and_begins_as_new(begun, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("piip_scale"), "propagate", True)
    for folder in (begun.tensorboard, begun.broken_samples, begun.checkpoints / "step_00000030"):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    begun.record_error(0, ValueError("old"))
    (begun.path / "notes.txt").write_text("the user's own")
    before = contents(begun.path)
    monkeypatch.setattr(StopFlag, "install", lambda self: None)
    monkeypatch.setattr(worker, "configure_logging", lambda rank: None)
    monkeypatch.setattr(worker.Session, "train", lambda session, factory: refuse_lost_checkpoints(session.run))
    assert worker.train_worker(tiny_config(), "model = 2\n", begun, None, restart=True) == 0
    assert begun.config.read_text() == "model = 2\n"
    assert begun.status().step == begun.status().checkpoint_step == 0
    assert not begun.metrics.exists()
    assert not begun.checkpoints.exists()
    assert "starting over: the run that was here is in" in caplog.text
    after = contents(begun.path)
    assert not set(before.values()) - set(after.values())
    assert after["notes.txt"] == b"the user's own"


def test_resuming_keeps_what_earlier_launches_left(begun, monkeypatch):
    begun.record_error(3, ValueError("old"))
    begun.resumed_config.write_text("model = 7\n")
    environment = begun.environment.read_bytes()
    begun.clear_traces()
    begun.open("model = 1\n", resume=True)
    kept = contents(begun.path / "earlier")
    assert {path.partition("/")[2] for path in kept} == {
        "errors/rank_3.txt",
        "errors/first.json",
        "resumed_config.py",
        "environment.json",
    }
    assert environment in kept.values()
    assert list(begun.errors.iterdir()) == []


def test_a_users_own_files_in_a_new_runs_folder_stay(tmp_path):
    (tmp_path / "config.py").write_text("# mine\nmodel = 1\n")
    (tmp_path / "errors" / "analysis").mkdir(parents=True)
    (tmp_path / "errors" / "analysis" / "mine.txt").write_text("mine")
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "heartbeats" / "ecg.csv").write_text("mine")
    before = contents(tmp_path)
    run = RunDirectory(tmp_path)
    run.clear_traces()
    run.open("model = 1\n", resume=False)
    assert not set(before.values()) - set(contents(tmp_path).values())
    assert run.config.read_text() == "model = 1\n"


def test_the_status_keeps_the_checkpoint_it_knows_of(begun):
    begun.note_checkpoint(30)
    begun.write_failure(Ending(reason="exception", line="x"))
    assert begun.status().checkpoint_step == 30
    assert json.loads(begun.status_file.read_text())["state"] == "failed"


def test_a_lost_folder_of_checkpoints_is_not_made_anew(begun, monkeypatch):
    monkeypatch.setattr(resuming, "on_main", lambda function: function())
    dangling(begun)
    before = contents(begun.path)
    with pytest.raises(CheckpointError, match="is a link to"):
        resuming.find_start(begun)
    assert contents(begun.path) == before
    assert not begun.checkpoints.exists()


def test_a_checkpoint_folder_that_cannot_be_written_is_found_at_the_start(begun, monkeypatch):
    monkeypatch.setattr(resuming, "on_main", lambda function: function())
    monkeypatch.setattr(resuming, "refuse_lost_checkpoints", lambda run: None)
    for left in begun.checkpoints.iterdir():
        left.rmdir()
    begun.checkpoints.rmdir()
    begun.checkpoints.symlink_to("/proc/self")
    with pytest.raises(CheckpointError, match="cannot save checkpoints in"):
        resuming.find_start(begun)
