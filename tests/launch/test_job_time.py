"""A job's time, as its controller tells it."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from test_slurm_commands import JOB

from piip_scale.launch.slurm_commands import Slurm
from piip_scale.launch.slurm_executor import time_of
from piip_scale.launch.slurm_records import parse_job
from piip_scale.launch.time_left import USUAL_KILL_WAIT_S, JobTime

NOW = time.mktime(time.strptime("2026-11-28T08:00:00", "%Y-%m-%dT%H:%M:%S"))


@pytest.mark.parametrize(
    ("limit_s", "run_s", "deadline", "expected"),
    [
        (3600, 600, "", JobTime(3600, 3000)),
        (3600, 3700, "", JobTime(3600, 0)),
        (None, 600, "", None),
        # A deadline may come before the limit.
        (3600, 600, "2026-11-28T08:10:00", JobTime(3600, 600)),
        (3600, 600, "2026-11-29T08:00:00", JobTime(3600, 3000)),
        (None, 600, "2026-11-28T08:10:00", JobTime(1200, 600)),
        (None, 600, "2026-11-28T07:00:00", JobTime(600, 0)),
        (3600, 600, "N/A", JobTime(3600, 3000)),
    ],
)
def test_a_job_ends_at_its_limit_or_at_its_deadline(limit_s, run_s, deadline, expected):
    job = replace(parse_job(JOB), limit_s=limit_s, run_s=run_s, deadline=deadline)
    assert time_of(job, NOW) == expected


@pytest.mark.parametrize(
    ("shown", "seconds"),
    [
        ("KillOnBadExit = 0\nKillWait                = 5 sec\n", 5.0),
        ("KillWait = 90 sec", 90.0),
        ("", USUAL_KILL_WAIT_S),
    ],
)
def test_how_long_slurm_waits_before_it_kills(monkeypatch, shown, seconds):
    monkeypatch.setattr(Slurm, "_run", lambda *_: shown)
    assert Slurm({}).kill_wait_s() == seconds
