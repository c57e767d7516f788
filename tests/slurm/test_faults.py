"""Real trainings on a real Slurm, and what befalls them: each ends as if nothing had happened, and says what did."""

from __future__ import annotations

import json
import os
import shutil
import signal

from jobs import HELD_AT, SAVED_AT, STOPPED_AT, wait_for


def fill_up(path, left_bytes):
    """Takes what room a disk has left, but for some."""
    with path.open("wb") as file:
        file.write(bytes(shutil.disk_usage(path.parent).free - left_bytes))


def test_a_sick_node_is_replaced_by_a_spare_and_a_done_job_stays_done(job, whole):
    job.go_on()
    job.submit("--spares", 1, PIIP_TEST_SICK="n2")
    (attempt,) = job.finished()
    assert (attempt.end, attempt.decision, attempt.nodes) == ("done", "finish", ("n1", "n3"))
    assert any("node n2 fails its preflight" in line and "0.00 GiB free" in line for line in job.lines())
    job.check_whole(whole)
    job.cluster.run("scontrol", "requeue", job.job_id)
    wait_for(job.log, lambda: any("nothing is left to do" in line for line in job.lines()))
    wait_for(job.log, lambda: job.cluster.state(job.job_id) == "COMPLETED")
    assert job.attempts() == (attempt,)


def test_a_killed_rank_ends_the_step_and_the_run_goes_on_in_the_same_allocation(job, whole):
    job.start()
    job.until_held()
    os.kill(job.pid(1), signal.SIGKILL)
    job.harmed()
    first = job.ended(0)
    job.go_on()
    _, second = job.finished()
    assert (first.end, first.ending.reason, first.ending.rank, first.ending.node) == ("crashed", "lost rank", 1, "n2")
    assert (first.decision, first.last_step, first.ending.step) == ("restart", SAVED_AT, HELD_AT)
    assert (second.end, second.first_step, second.restart_count) == ("done", SAVED_AT, 0)
    assert "rank 1 on n2" in (job.run_dir / "job" / "attempt-0" / "errors" / "first.json").read_text()
    job.check_whole(whole)


def test_a_killed_supervisor_sends_its_job_back(job, whole):
    job.start()
    job.until_held()
    os.kill(job.supervisor_pid(), signal.SIGKILL)
    job.harmed()
    first = job.ended(0)
    job.until_released()
    job.go_on()
    _, second = job.finished()
    assert (first.end, first.decision, first.last_step) == ("cut", "requeue", SAVED_AT)
    assert "its supervisor was killed (SIGKILL)" in first.why
    assert (second.job_id, second.restart_count) == (first.job_id, 1)
    # Ranks that Slurm ends for the requeueing may save once more.
    assert second.first_step in (SAVED_AT, STOPPED_AT)
    job.check_whole(whole)


def test_where_the_guard_is_killed_too_slurm_tells_how_the_run_ended(job):
    job.submit()
    job.until_held()
    supervisor, guard = job.supervisor_pids()
    # The guard first, which would act; at last the ranks, which would save if Slurm gave them the time, and be stopped.
    for pid in [guard, supervisor, job.pid(0), job.pid(1)]:
        os.kill(pid, signal.SIGKILL)
    wait_for(job.log, lambda: not job.cluster.run("squeue", "-h", "-o", "%i").strip())
    (row,) = map(json.loads, job.command("jobs", "--runs", job.run_dir, "--json").splitlines())
    assert (row["state"], row["job"]) == ("failed", str(job.job_id))
    assert row["event"] == "Slurm ended its job (failed); it goes on with piip-scale jobs requeue, or --resume"
    job.go_on()
    assert "again, as job" in job.command("jobs", "requeue", job.run_dir)
    wait_for(job.log, lambda: len(job.attempts()) == 2 and job.attempts()[1].decision)
    first, second = job.attempts()
    assert (first.end, second.end, second.first_step) == ("cut", "done", first.last_step)


def test_a_hanging_rank_leaves_all_stacks_and_the_run_goes_on(job, whole):
    job.start(settings=job.settings(train__hang_minutes=0.2))
    job.until_held()
    os.kill(job.pid(1), signal.SIGSTOP)
    job.go_on()
    job.harmed()
    first = job.ended(0)
    job.finished()
    assert (first.end, first.ending.rank, first.ending.node, first.decision) == ("hang", 1, "n2", "restart")
    assert "rank 1 did not arrive" in first.ending.line
    stacks = job.run_dir / "job" / "attempt-0" / "stacks"
    assert "_train_step" in (stacks / "rank_0.txt").read_text()
    assert (stacks / "rank_1.txt").read_text()
    job.check_whole(whole)


def test_a_lost_node_is_replaced_by_a_spare_without_the_queue(job, whole):
    job.start(spares=1)
    job.until_held()
    job.cluster.take_down("n2")
    job.harmed()
    first = job.ended(0)
    job.go_on()
    _, second = job.finished()
    assert (first.end, first.ending.node, first.decision) == ("lost_node", "n2", "restart")
    assert (second.nodes, second.job_id, second.restart_count) == (("n1", "n3"), first.job_id, 0)
    assert "n2" in (job.run_dir / "job" / "bad_nodes.json").read_text()
    job.check_whole(whole)


def test_a_node_lost_without_spares_sends_the_job_through_the_queue(job, whole):
    job.start()
    job.until_held()
    job.cluster.take_down("n2")
    job.harmed()
    wait_for(job.log, lambda: len(job.attempts()) > 1)
    job.go_on()
    first, second = job.finished()
    assert first.end in ("lost_node", "cut", "stopped")
    assert (second.restart_count, second.nodes) == (1, ("n1", "n3"))
    job.check_whole(whole)


def test_a_node_whose_daemons_are_gone_is_named_and_left_out(job, whole):
    job.submit()
    job.until_held()
    job.cluster.kill_daemons("n2")
    job.harmed()
    wait_for(job.log, lambda: len(job.attempts()) > 1)
    job.go_on()
    attempts = job.finished()
    assert attempts[-1].end == "done"
    assert "n2" not in attempts[-1].nodes
    job.check_whole(whole)


def test_a_full_disk_costs_one_save_and_nothing_that_was_there(job, whole, small_disk):
    job.run_dir = small_disk / "run"
    job.start()
    job.until_held()
    filler = small_disk / "filler"
    # Enough for logs, and for a part of a checkpoint.
    fill_up(filler, left_bytes=1 << 20)
    job.go_on()
    job.harmed()
    wait_for(job.log, lambda: any("No space left" in line for line in job.lines()))
    filler.unlink()
    attempts = job.finished()
    first = attempts[0]
    assert (first.ending.reason, first.decision, first.last_step) == ("input or output", "restart", SAVED_AT)
    job.check_whole(whole)
