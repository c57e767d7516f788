"""The small cluster as a user brings it up: nodes, GPUs, one at a time in a folder, and nothing left of it."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "minislurm"


def minislurm(*words):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )


def processes_of(folder):
    """Everything that the cluster in a folder started and that still runs."""
    mine = f"SLURM_CONF={folder / 'slurm.conf'}".encode()
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and mine in (process / "environ").read_bytes().split(b"\0"):
                yield process.name


@pytest.mark.usefixtures("cluster")
def test_two_clusters_side_by_side_do_not_meet_and_leave_nothing(tmp_path):
    words = ["--nodes", 2, "--cpus", 2, "--gpus", 2, "--dir", tmp_path, "--port", 19100 + os.getpid() % 400 * 3]
    try:
        up = minislurm("up", *words)
        assert up.returncode == 0, up.stderr
        assert up.stdout == f"export SLURM_CONF={tmp_path}/slurm.conf\n"
        again = minislurm("up", *words)
        assert again.returncode == 1
        assert "a cluster is up" in again.stderr
        environment = os.environ | {"SLURM_CONF": f"{tmp_path}/slurm.conf"}
        step = ["srun", "-N2", "--gpus-per-node=2", "bash", "-c", "echo $SLURMD_NODENAME:$CUDA_VISIBLE_DEVICES"]
        told = subprocess.run(step, capture_output=True, text=True, timeout=60, check=True, env=environment).stdout
        assert sorted(told.split()) == ["n1:0,1", "n2:0,1"]
        waiting = ["sbatch", "--output=/dev/null", "--wrap", "sleep 600"]
        subprocess.run(waiting, capture_output=True, timeout=60, check=True, env=environment)
    finally:
        down = minislurm("down", "--dir", tmp_path)
    assert down.returncode == 0, down.stderr
    assert list(processes_of(tmp_path)) == []
