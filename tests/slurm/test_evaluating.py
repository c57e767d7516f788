"""An evaluation submitted as a user does, on real daemons: each image once on two nodes, as one process finds it."""

from __future__ import annotations

import json

import pytest
from commands import piip_scale, succeeded
from jobs import wait_for

pytestmark = pytest.mark.timeout(420)


def test_an_evaluation_on_two_nodes_is_one_process_own_to_the_last_digit(cluster, config, job, tmp_path):
    run, out = tmp_path / "a run", tmp_path / "its scores"
    words = ["--set", "train.steps=1", "--set", "train.evaluate_every_steps=0", "--set", "data.workers=0"]
    succeeded(piip_scale("train", config, "--run-dir", run, *words))
    one = tmp_path / "one.json"
    succeeded(piip_scale("evaluate", run, "--out", one))
    profile = tmp_path / "site.toml"
    profile.write_text('gpu_request = "none"\ncpus_per_rank = 1\n[environment]\nOMP_NUM_THREADS = "1"\n')
    asked = ["submit", "evaluate", run, "--out", out, "--nodes", 2, "--gpus-per-node", 1, "--profile", profile]

    assert "#SBATCH --nodes=2\n" in job.command(*asked, "--dry-run")
    assert not out.exists()
    assert "Slurm would refuse the job" in job.command(*asked, "--partition", "nope", code=1)
    assert not out.exists()

    held = job.command(*asked, "--sbatch", "hold")
    number = held.split("submitted job ")[1].split()[0]
    assert f"has job {number}" in job.command(*asked, code=1)
    cluster.run("scontrol", "release", number)
    wait_for(lambda: _log(out), lambda: not cluster.run("squeue", "-h", "-o", "%i").strip())
    assert cluster.state(number) == "COMPLETED", _log(out)
    assert json.loads((out / "metrics.json").read_text()) == json.loads(one.read_text())
    assert {"predictions.json", "per_class.csv", "job"} <= {path.name for path in out.iterdir()}
    assert _log(out).count("Average precision") == 1

    failing = [*asked, "--data-on-nodes", "--shards", tmp_path / "none", "--out", tmp_path / "failed"]
    job.command(*failing)
    wait_for(lambda: _log(tmp_path / "failed"), lambda: not cluster.run("squeue", "-h", "-o", "%i").strip())
    assert _log(tmp_path / "failed").count("piip-scale: error:") == 1


def _log(out):
    return "\n".join(path.read_text(errors="replace") for path in sorted((out / "job").glob("log-*.txt")))
