"""What submit says before anything is sent; tests/slurm sends."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from commands import command, environment, failed_in_one_line, piip_scale, succeeded, without_slurm
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.errors import PiipError

H6B = Path(__file__).parents[2] / "configs" / "coco" / "mask_rcnn_h6b_1024_512.py"
BATCH = ("--nodes", 2, "--gpus-per-node", 1)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--profile", "infiniban"], ["unknown profile: got 'infiniban'", "did you mean infiniband", "minislurm"]),
        (["--profile", "none.toml"], ["profile file not found", "profiles that ship"]),
        (["--sbatch", "partitoin=gpu"], ["--sbatch: unknown option partitoin", "did you mean partition", "wckey"]),
        (["--sbatch", "nodes=3"], ["option nodes; it follows from --nodes and --spares"]),
        (["--partition", "a\nb"], ["command line: option partition", "a text of one line"]),
        (["--array", "0-3"], ["--array: got '0-3'", "add --sweep"]),
        (["--sweep", "optimizer.lr"], ["--sweep: got 'optimizer.lr'"]),
        (["--run-dir", "a\\b"], ["--run-dir", "without backslashes"]),
        (["--job-name", "a\nb"], ["--job-name", "one line"]),
    ],
)
def test_what_cannot_be_meant_is_one_line(config, tmp_path, words, parts):
    if "--run-dir" not in words:
        words = [*words, "--run-dir", tmp_path / "run"]
    failed_in_one_line(piip_scale("submit", config, *BATCH, *words, "--dry-run"), *parts)
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_nothing_is_sent_and_nothing_written(config, tmp_path):
    done = without_slurm("submit", config, *BATCH, "--run-dir", tmp_path / "run")
    failed_in_one_line(done, "Slurm's squeue is not on this machine", "launch/minislurm", code=1)
    assert list(tmp_path.iterdir()) == []


def test_the_config_is_checked_for_all_ranks_before_anything_is_sent(config, tmp_path):
    words = ["--nodes", 3, "--gpus-per-node", 1, "--set", "train.images_per_step=4", "--run-dir", tmp_path / "r"]
    done = without_slurm("submit", config, *words, "--dry-run")
    failed_in_one_line(done, "3 ranks cannot share the 4 images of train.images_per_step", "take 1, 2 or 4 ranks")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 64])
def test_the_published_recipe_is_rendered_or_refused_with_what_renders_it(tmp_path, nodes):
    words = [
        "submit",
        str(H6B),
        "--nodes",
        str(nodes),
        "--run-dir",
        str(tmp_path / "r"),
        "--dry-run",
        "--data-on-nodes",
    ]
    done = CliRunner().invoke(app, words)
    if nodes > 2:
        assert isinstance(done.exception, PiipError)
        told = re.search(r"or pass (--set \S+ --set [^ ,]+), which is another recipe$", done.exception.line)[1]
        done = CliRunner().invoke(app, [*words, *told.split()])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("#!/bin/bash\n")
    assert ("data.micro_batch_size=1 in place of 2" in done.stderr) == (nodes > 1)


def test_a_dry_run_prints_the_script_alone(config, tmp_path):
    run_dir = tmp_path / 'it\'s 50% "mine"'
    site = tmp_path / "site.toml"
    site.write_text("gpu_memory_gib = 80\n[sbatch]\npartition = 'slow'\nqos = 'site'\n")
    words = ["--profile", site, "--partition", "gpu", "--set", "train.steps=3", "--run-dir", run_dir, "--spares", 1]
    shell = {"SBATCH_QOS": "shell", "SBATCH_ACCOUNT": "ann", "SBATCH_EXPORT": "NONE"}
    done = succeeded(piip_scale("submit", config, *BATCH, *words, "--dry-run", **shell))
    lines = done.stdout.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert "of 80 GiB a GPU" in done.stderr
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {"nodes=3", "partition=gpu", "qos=site", "account=ann", "no-kill", "gpus-per-node=1"} <= asked
    assert f"chdir={os.getcwd()}" in asked
    assert [line for line in lines if "[" in line and line.startswith("# [")] == []
    assert [path.name for path in tmp_path.iterdir()] == ["site.toml"]


ABSENT = {
    "data.train_shards": "not checked: ",
    "data.val_shards": "not checked: ",
    "model.pretrained": "not checked: ",
}


@pytest.mark.parametrize("key", ABSENT)
def test_a_dry_run_renders_where_data_or_weights_are_elsewhere(config, tmp_path, key):
    words = ["submit", config, *BATCH, "--run-dir", tmp_path / "r", "--set", f"{key}=/nodes/only", "--dry-run"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("#!/bin/bash\n")
    assert ABSENT[key] in done.stderr
    assert "/nodes/only" in done.stderr
    promised = CliRunner().invoke(app, [*map(str, words), "--data-on-nodes"])
    assert promised.exit_code == 0, promised.output
    assert "looked at by the job's preflight" in promised.stderr
    # What needs neither is refused all the same.
    for sharding in ("zero.node_partition=3", "zero.shard_over=3"):
        refused = CliRunner().invoke(app, [*map(str, words), "--set", sharding])
        assert isinstance(refused.exception, PiipError)
        assert f"{sharding.split('=')[0]}: got 3" in refused.exception.line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["run"], ["Missing option '--out'"]),
        (["--out", "o"], ["it evaluates a model"]),
        (["run", "--out", "o.json"], ["--out: got 'o.json'", "a job writes a folder"]),
        (["run", "--out", "o", "--procs", "2"], ["--procs: got 2", "--gpus-per-node"]),
        (["run", "--out", "o", "--mteric", "voc"], ["No such option: --mteric"]),
        (["run", "--out", "o", "--metric", "vox"], ["Invalid value for '--metric'"]),
        (["run", "--out", "o", "--results", "r.json"], ["needs no job"]),
        (["run", "--out", "a\\b"], ["--out", "without backslashes"]),
        (["run", "--out", "o", "--profile", "infiniban"], ["did you mean infiniband"]),
        (["run", "--out", "o", "--sbatch", "nodes=3"], ["option nodes; it follows from --nodes"]),
        (["run", "--out", "o"], ["run"]),
    ],
)
def test_an_evaluation_that_cannot_be_meant_is_not_sent(monkeypatch, tmp_path, words, parts):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["submit", "evaluate", *words, "--dry-run"], env={"COLUMNS": "200"})
    told = done.output + (done.exception.line if isinstance(done.exception, PiipError) else "")
    assert done.exit_code
    assert isinstance(done.exception, PiipError | SystemExit)
    for part in parts:
        assert part in told
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_of_what_only_the_nodes_see_is_rendered(config, tmp_path):
    words = ["submit", "evaluate", config, "/nodes/w.safetensors", "--out", tmp_path / "o", "--flip", "--dry-run"]
    done = CliRunner().invoke(app, [*map(str, words), "--data-on-nodes", "--gpus-per-node", "2"])
    assert done.exit_code == 0, done.output
    frozen = tmp_path / "o" / "job" / "frozen"
    assert f"set -- {frozen}/config.py /nodes/w.safetensors --flip --out {tmp_path}/o\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_jobs_without_any_say_where_to_look(tmp_path):
    done = without_slurm("jobs", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert "no runs in runs; --runs DIR looks elsewhere" in done.stderr
    failed_in_one_line(piip_scale("jobs", "--runs", tmp_path / "none"), "a folder that is there", code=1)
    failed_in_one_line(piip_scale("jobs", "stop", tmp_path), "no run's directory", code=1)


def test_jobs_answer_without_torch():
    code = (
        "import sys, piip_scale.cli.app, piip_scale.launch.control, piip_scale.launch.submitting, piip_scale.cli.jobs;"
    )
    code += "print([name for name in ('torch', 'numpy', 'deepspeed', 'mmengine') if name in sys.modules])"
    done = subprocess.run(
        [command()[0], "-c", code], capture_output=True, text=True, check=True, timeout=240, env=environment()
    )
    assert done.stdout.strip() == "[]"
