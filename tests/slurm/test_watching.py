"""What ``jobs --watch`` shows of a real job: in the queue, at work, between two attempts, standing still, stopping."""

from __future__ import annotations

import json
import os
import signal
from itertools import pairwise

import pytest
from commands import command
from jobs import HELD_AT, wait_for
from screen import Screen


@pytest.fixture
def screen(job):
    job.run_dir.mkdir()
    screen = Screen(command("jobs", "--watch", "--every", 1, "--runs", job.run_dir.parent), job.environment())
    yield screen
    assert screen.leave() == 0


def test_each_state_of_a_job_is_on_the_screen_while_it_lasts(job, screen):
    def shown(state, *words):
        """Waits until the job's line, and the one below that what has no room in it goes on, have all of these."""

        def found():
            lines = [*screen.lines(), ""]
            told = ["".join(pair) for pair in pairwise(lines) if job.run_dir.name in pair[0]]
            return any(f" {state} " in line and all(word in line for word in words) for line in told)

        wait_for(lambda: f"{state} {words}: {screen.lines()} {job.log()}", found)

    def listed():
        return json.loads(job.command("jobs", "--runs", job.run_dir, "--json"))

    others = job.cluster.run("sbatch", "--parsable", "--exclusive", "-N3", "-o", "/dev/null", "--wrap", "sleep 900")
    job.pause.touch()
    job.submit(PIIP_TEST_PAUSE=str(job.pause))
    shown("queued", f" {job.job_id} ", "waits (")
    job.cluster.run("scancel", others.strip())
    job.until_held()
    shown("running", f" {HELD_AT}/")
    killed = job.pid(1)

    os.kill(killed, signal.SIGKILL)
    shown("waiting", "rank 1 on n2")
    assert (listed()["eta_s"], listed()["images_per_second"]) == (None, None)
    job.pause.unlink()

    wait_for(job.log, lambda: [beat["step"] for beat in job.beats() if beat["pid"] != killed] == [HELD_AT] * 2)
    os.kill(job.pid(1), signal.SIGSTOP)
    job.go_on()
    shown("stalled", "waits for rank 1 on n2, after step 6, silent for ")

    # Ranks save only once the one that stands still has come.
    job.command("jobs", "stop", job.run_dir)
    shown("stopping", "stop was asked for by ", " ago; waits for rank 1 on n2")
    os.kill(job.pid(1), signal.SIGCONT)
    job.finished()
    shown("stopped")
    assert listed()["state"] == "stopped"
