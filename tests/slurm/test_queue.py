"""Jobs that leave the queue and come back: time limits, preemption, requeueing by anybody, successors; and bad ones."""

from __future__ import annotations

import pytest
from jobs import SAVED_AT, STOPPED_AT, wait_for


def test_before_the_time_limit_the_run_saves_and_the_job_comes_back(job, whole):
    job.start("--time=10", settings=job.settings(data__workers=1))
    job.until_held()
    minutes = job.cluster.field(job.job_id, "RunTime").split(":")[-2]
    job.cluster.run("scontrol", "update", f"jobid={job.job_id}", f"timelimit={int(minutes) + 1}")
    wait_for(job.log, lambda: any("SIGUSR2 came" in line for line in job.lines()))
    job.harmed()
    first = job.ended(0)
    job.until_released()
    job.cluster.run("scontrol", "update", f"jobid={job.job_id}", "timelimit=30")
    job.go_on()
    _, second = job.finished()
    assert (first.end, first.last_step, first.decision) == ("stopped", STOPPED_AT, "requeue")
    assert first.ending.cause == "time limit"
    assert (second.job_id, second.restart_count, second.first_step) == (first.job_id, 1, STOPPED_AT)
    job.check_whole(whole)


def test_a_preempted_run_saves_within_its_grace_and_comes_back(job, whole):
    job.start(settings=job.settings(data__workers=1))
    job.until_held()
    job.cluster.run("sbatch", "-p", "prio", "--exclusive", "-N3", "-o", "/dev/null", "--wrap", "sleep 1")
    job.harmed()
    first = job.ended(0)
    job.until_released()
    job.go_on()
    _, second = job.finished()
    assert (first.end, first.last_step, first.decision) == ("stopped", STOPPED_AT, "requeue")
    assert first.ending.cause == "preemption"
    assert (second.end, second.first_step) == ("done", STOPPED_AT)
    job.check_whole(whole)


def test_a_job_that_somebody_requeues_goes_on_from_a_checkpoint(job, whole):
    job.start()
    job.until_held()
    job.harmed()
    job.cluster.run("scontrol", "requeue", job.job_id)
    job.until_released()
    wait_for(job.log, lambda: len(job.attempts()) > 1)
    job.go_on()
    first, second = job.finished()
    assert first.decision == "requeue"
    assert second.restart_count == 1
    assert second.first_step in (SAVED_AT, STOPPED_AT)
    job.check_whole(whole)


def test_where_jobs_cannot_requeue_a_successor_goes_on_and_a_stop_is_for_good(job, whole):
    job.submit(requeue=False)
    job.until_held()
    before = {beat["pid"] for beat in job.beats()}
    job.command("jobs", "requeue", job.run_dir)
    first = job.ended(0)
    assert (first.end, first.ending.cause, first.decision) == ("stopped", "requeue", "requeue")
    # Held before their first step, they have told of no step yet.
    wait_for(job.log, lambda: len([beat for beat in job.beats() if beat["pid"] not in before]) == 2)
    wait_for(job.log, lambda: f"resumed after step {STOPPED_AT}" in (job.run_dir / "metrics.jsonl").read_text())
    job.command("jobs", "stop", job.run_dir)
    first, second = job.finished()
    assert second.job_id == job.newest_job() != first.job_id
    assert (second.end, second.ending.cause, second.decision) == ("stopped", "user", "finish")
    job.go_on()
    job.submit("--resume")
    wait_for(job.log, lambda: len(job.attempts()) > 2)
    job.finished()
    job.check_whole(whole)


@pytest.mark.parametrize("teller", ["nodes", "ranks"])
def test_a_bad_config_is_told_once_and_never_tried_again(job, teller):
    bad = job.folder / "bad.py"
    bad.write_text(job.config.read_text().replace("num_heads=4, patch", "num_heads=5, patch", 1))
    job.config = bad
    job.start(look=teller == "nodes")
    (attempt,) = job.finished()
    assert (attempt.decision, attempt.ending.reason) == ("give_up", "bad config")
    assert attempt.end == ("preflight" if teller == "nodes" else "crashed")
    assert "num_heads=5 must divide embed_dim=64" in attempt.why
    assert job.cluster.state(job.job_id) == "FAILED"
    text = job.log()
    assert "Traceback" not in text
    assert text.count("-> give up") == 1
    if teller == "ranks":
        assert text.count("piip-scale: error:") == 1
