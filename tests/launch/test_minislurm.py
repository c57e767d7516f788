"""What launch/minislurm says of arguments that cannot be meant; tests/slurm brings clusters up."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "minislurm"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["up", "--nodes", "x"], "--nodes: got 'x'; a whole number from 1 to 64"),
        (["up", "--nodes", "0"], "--nodes: got '0'"),
        (["up", "--gpus", "8"], "--gpus: got '8'; a whole number from 0 to 7"),
        (["up", "--port", "80"], "--port: got '80'"),
        (["up", "--port"], "--port needs a value"),
        (["down", "--node", "2"], "unknown option '--node'; there are --nodes"),
        (["up", "--dir", "/tmp/a b"], "--dir: got '/tmp/a b'"),
        (["restart"], "launch/minislurm up"),
        ([], "launch/minislurm down"),
    ],
)
def test_arguments_are_checked(words, told):
    done = subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode in (1, 2)
    assert told in done.stderr
    assert done.stdout == ""


def test_nothing_to_bring_down_is_no_error(tmp_path):
    done = subprocess.run(
        ["bash", str(SCRIPT), "down", "--dir", str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
