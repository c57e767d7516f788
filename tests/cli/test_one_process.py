"""Commands of one process under torchrun or srun: done once, by rank 0."""

import json
import os

import pytest
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.run.environment import command_text, describe_environment, few_cores_line
from piip_scale.world import usable_cores

WORLD = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_NODEID": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def of_torchrun(rank):
    return WORLD | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def of_slurm(rank):
    return SLURM | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


@pytest.mark.parametrize("launched", [of_torchrun, of_slurm])
@pytest.mark.parametrize("command", ["convert", "predict", "count", "plan"])
def test_other_ranks_leave_and_do_nothing(tmp_path, launched, command):
    arguments = [str(tmp_path / "in"), str(tmp_path / "out.safetensors")]
    done = CliRunner().invoke(app, [command, *arguments], env=launched(1))
    assert (done.exit_code, done.output) == (0, "")
    assert list(tmp_path.iterdir()) == []
    # Rank 0 goes about it: here, to find that there is nothing to read.
    assert CliRunner().invoke(app, [command, *arguments], env=launched(0)).exit_code != 0


def test_rank_0_says_that_it_works_alone():
    done = CliRunner().invoke(app, ["weights", "import", "x", "--backbone", "y", "--out", "z"], env=of_torchrun(0))
    assert "weights is done by one process: rank 0 of 2" in done.stderr


def test_half_a_world_is_none():
    done = CliRunner().invoke(app, ["count", "nothing.py"], env={"RANK": "1"})
    assert done.exit_code != 0


def test_the_record_says_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cores() == 1
    described = json.loads(json.dumps(describe_environment()))
    assert (described["cores"], described["cores_of_node"]) == (1, 64)


@pytest.mark.parametrize(("usable", "of_node", "is_told"), [(1, 64, True), (2, 64, False), (1, 1, False)])
def test_one_core_of_many_is_told_with_what_helps(usable, of_node, is_told):
    line = few_cores_line(usable, of_node)
    assert ("1 of its node's 64 cores" in line and "--cpus-per-task" in line) == is_told
    assert bool(line) == is_told


def test_the_command_is_told_as_its_user_gave_it(monkeypatch):
    for called in ("/opt/env/bin/piip-scale", "/src/piip_scale/cli/main.py"):
        monkeypatch.setattr("sys.argv", [called, "train", "my config.py", "--set=optimizer.lr=3e-4"])
        assert command_text() == "piip-scale train 'my config.py' \\\n  --set=optimizer.lr=3e-4"
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert command_text() == "train.py"
