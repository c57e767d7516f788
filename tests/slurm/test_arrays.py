"""A sweep on real daemons: what befalls one task of the array is that task's alone."""

from __future__ import annotations

import copy
import json

import pytest
from jobs import HELD_AT, PROFILE, STEPS, STOPPED_AT, wait_for

RATES = ("1e-3", "2e-3", "3e-3")


@pytest.fixture
def tasks(job):
    """Three runs of one array, each on a node of its own, that wait after six steps."""
    profile = job.folder / "site.toml"
    profile.write_text(PROFILE.format(requeue="true"))
    words = ["--nodes", 1, "--gpus-per-node", 1, "--profile", profile, "--sbatch", "exclusive"]
    words += ["--sweep", f"optimizer.lr={','.join(RATES)}", "--run-dir", job.run_dir]
    job.command("submit", job.config, *words, *job.settings())
    runs = []
    for index, rate in enumerate(RATES):
        run = copy.copy(job)
        run.run_dir = job.run_dir / f"{index}-lr={rate}"
        run.job_id = run.newest_name()
        runs.append(run)
    for run in runs:
        wait_for(run.log_of_array, lambda run=run: [beat["step"] for beat in run.beats()] == [HELD_AT])
    return runs


@pytest.mark.timeout(600)
def test_what_befalls_one_task_is_no_other_ones(job, tasks):
    stopped, requeued, lost = tasks
    (node,) = lost.attempts()[0].nodes
    job.command("jobs", "stop", stopped.run_dir)
    assert stopped.ended(0).decision == "finish"
    job.command("jobs", "requeue", requeued.run_dir)
    assert requeued.ended(0).decision == "requeue"
    job.cluster.take_down(node)
    for run in (requeued, lost):
        wait_for(run.log_of_array, lambda run=run: len(run.attempts()) == 2)
    job.go_on()
    for run in (requeued, lost):
        assert (run.ended(1).end, run.ended(1).decision) == ("done", "finish"), run.log_of_array()
    wait_for(job.log, lambda: not job.cluster.run("squeue", "-h", "-o", "%i").strip())
    (end,) = stopped.attempts()
    assert (end.end, end.ending.cause, end.last_step) == ("stopped", "user", STOPPED_AT)
    assert [attempt.restart_count for attempt in requeued.attempts()] == [0, 1]
    assert requeued.attempts()[0].end == "stopped"
    assert lost.attempts()[0].end in ("cut", "lost_node", "stopped")
    assert node not in lost.attempts()[1].nodes
    # Nobody blamed a node that was only another task's.
    for run in (stopped, requeued):
        assert not (run.run_dir / "job" / "bad_nodes.json").exists()
        assert run.cluster.field(run.job_id, "ExcNodeList") in ("(null)", "")
    assert set(lost.bad_nodes()) <= {node}
    rows = map(json.loads, filter(None, job.command("jobs", "--runs", job.run_dir, "--json").splitlines()))
    assert [(row["state"], row["step"]) for row in rows] == [("stopped", STOPPED_AT), ("done", STEPS), ("done", STEPS)]
