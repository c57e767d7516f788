"""What submit, jobs and the bare script do on real daemons: refusals, freezing, sweeps, watching, by hand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import command, failed_in_one_line
from jobs import STEPS, wait_for

import piip_scale

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(420)


@pytest.fixture
def free(job):
    """A job whose ranks wait for nobody."""
    job.go_on()
    return job


def refused(job, *words, **more):
    done = subprocess.run(
        command(*words), capture_output=True, text=True, env=job.environment(**more), timeout=120, check=False
    )
    return failed_in_one_line(done, code=done.returncode or -1)


def options(job, **changes):
    profile = job.folder / "site.toml"
    profile.write_text('gpu_request = "none"\ncpus_per_rank = 1\n[environment]\nOMP_NUM_THREADS = "1"\n')
    given = {"--nodes": 1, "--gpus-per-node": 1, "--profile": profile, "--run-dir": job.run_dir}
    pairs = {**given, **{f"--{name.replace('_', '-')}": value for name, value in changes.items()}}
    return [word for pair in pairs.items() for word in pair]


def listed(job):
    """What `jobs` tells of each run, by its folder's name."""
    told = job.command("jobs", "--runs", job.folder, "--json")
    rows = map(json.loads, filter(None, told.splitlines()))
    return {Path(row["run"]).name: row for row in rows}


def test_a_job_that_slurm_would_refuse_leaves_nothing_behind(job):
    line = refused(job, "submit", job.config, *options(job, partition="nope"))
    assert "Slurm would refuse the job: invalid partition specified: nope" in line
    assert not job.run_dir.exists()


def test_a_dry_run_writes_and_sends_nothing(job):
    script = job.command("submit", job.config, *options(job), "--dry-run", SLURM_CONF="/dev/null")
    assert script.startswith("#!/bin/bash\n")
    assert f'#SBATCH --output="{job.run_dir}/job/log-%j.txt"' in script
    assert not job.run_dir.exists()


def test_a_job_that_waits_is_frozen_refuses_a_second_and_can_be_taken_back(job):
    """The package and the config are ruined once the job is in the queue; it trains as it was submitted."""
    checkout = job.folder / "checkout"
    shutil.copytree(Path(piip_scale.__file__).parent, checkout / "piip_scale", ignore=shutil.ignore_patterns("__py*"))
    config = shutil.copy(job.config, checkout / "mine.py")
    shutil.copytree(ROOT / "launch", checkout / "launch")
    more = {"PYTHONPATH": str(checkout)}
    words = [config, *options(job), *job.settings(), "--sbatch", "hold"]
    told = job.command("submit", *words, **more)
    assert "submitted job" in told
    assert "tensorboard --logdir" in told
    assert "has job" in refused(job, "submit", *words, **more)
    (checkout / "piip_scale" / "cli" / "main.py").write_text("raise SystemExit('the edited checkout ran')\n")
    (checkout / "piip_scale" / "engine" / "worker.py").write_text("raise SystemExit('the edited checkout ran')\n")
    config.write_text("model = 'edited'\n")
    assert listed(job)[job.run_dir.name]["state"] == "held"
    assert "was held" in job.command("jobs", "requeue", job.run_dir)
    assert [attempt.end for attempt in job.finished()] == ["done"]
    assert job.status()["step"] == STEPS
    assert "the edited checkout ran" not in job.log()
    row = listed(job)[job.run_dir.name]
    assert (row["state"], row["step"], row["total_steps"], row["restarts"]) == ("done", STEPS, STEPS, 0)


def test_a_waiting_job_is_stopped_by_leaving_the_queue(job):
    job.submit("--sbatch", "hold")
    assert "out of the queue" in job.command("jobs", "stop", job.run_dir)
    wait_for(job.log, lambda: job.cluster.state(job.job_id) == "CANCELLED")
    assert listed(job)[job.run_dir.name]["state"] == "cancelled"
    assert "nothing of" in refused(job, "jobs", "stop", job.run_dir)


def test_a_sweep_is_one_job_with_a_run_for_each_value(free):
    folder = free.folder / "it's a sweep"
    words = options(free, run_dir=folder, array="0-1%1", sweep="optimizer.lr=1e-3,2e-3,3e-3")
    submit = command("submit", free.config, *words, *free.settings(train__steps=2), "--watch")
    watched = subprocess.run(
        submit, capture_output=True, text=True, env=free.environment(), timeout=360, check=True
    ).stdout
    assert "(2 runs)" in watched
    rows = listed(free)
    assert {name: row["state"] for name, row in rows.items()} == {"0-lr=1e-3": "done", "1-lr=2e-3": "done"}
    for name, rate in (("0-lr=1e-3", "0.001"), ("1-lr=2e-3", "0.002")):
        assert f"'lr': {rate}" in (folder / name / "config.py").read_text()
        # Both logs were followed to their ends.
        assert "the training is done" in free.command("jobs", "logs", folder / name)
    assert watched.count("the training is done") >= 2


def test_leaving_a_watched_job_leaves_it_running(job):
    words = command("submit", job.config, *options(job), *job.settings(), "--watch")
    watching = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=job.environment())
    try:
        wait_for(job.log, lambda: "training from step 0" in watching.stdout.readline())
        watching.send_signal(signal.SIGINT)
        _, errors = watching.communicate(timeout=60)
    finally:
        watching.kill()
    assert (watching.returncode, "Traceback" in errors) == (0, False)
    assert "the job goes on: piip-scale jobs logs -f" in errors
    assert listed(job)[job.run_dir.name]["state"] == "running"
    job.command("jobs", "stop", job.run_dir)
    job.go_on()
    assert job.finished()[-1].ending.cause == "user"


def test_the_script_works_by_hand(free):
    """As an administrator would try it: copied, started from a checkout with a .venv, no command of ours."""
    script = shutil.copy(ROOT / "launch" / "train.sbatch", free.folder / "my train.sbatch")
    (free.folder / ".venv").symlink_to(sys.prefix)
    words = ["--parsable", "--nodes=2", "--ntasks-per-node=1", "--time=10", f"--chdir={free.folder}"]
    words += [f"--output={free.folder}/log-%j.txt", script, free.config, "--run-dir", "by hand"]
    environment = free.environment()
    done = subprocess.run(
        ["sbatch", *map(str, words), *free.settings(train__steps=2)],
        capture_output=True, text=True, env=environment, check=True, timeout=60,
    )  # fmt: skip
    log = free.folder / f"log-{done.stdout.strip()}.txt"
    free.run_dir = free.folder / "by hand"
    free.finished()
    assert free.status()["state"] == "done", log.read_text()
    assert "on 2 nodes" in log.read_text()
    assert "was submitted by hand" in refused(free, "jobs", "logs", free.run_dir)


def test_a_run_without_slurm_is_listed_and_stopped(job):
    """In a shell that knows no cluster."""
    outside = {"SLURM_CONF": "/dev/null", "PATH": f"{Path(sys.executable).parent}:/bin"}
    words = ["train", job.config, "--procs", "2", "--run-dir", job.run_dir, *job.settings(train__steps=5000)]
    job.go_on()
    environment = job.environment() | outside
    local = subprocess.Popen(command(*words), stderr=subprocess.DEVNULL, env=environment, start_new_session=True)
    try:
        wait_for(
            "steps", lambda: local.poll() is None and any(row["images_per_second"] for row in listed(job).values())
        )
        row = listed(job)[job.run_dir.name]
        assert (row["state"], row["total_steps"]) == ("running", 5000)
        assert row["eta_s"] > 0
        assert "save and stop" in job.command("jobs", "stop", job.run_dir, **outside)
        assert local.wait(timeout=120) == 130
    finally:
        if local.poll() is None:
            os.killpg(local.pid, signal.SIGKILL)
    row = listed(job)[job.run_dir.name]
    assert (row["state"], row["job"]) == ("stopped", "-")
