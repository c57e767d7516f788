"""Where the supervisor itself is killed, its job goes back into the queue, and not for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import save
from histories import attempt
from scenes import Scene

from piip_scale.launch.spec import Request, save_request


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def last_of(scene):
    return scene.history.read()[-1]


def test_a_killed_supervisor_sends_the_job_back(scene):
    scene.history.write(attempt(0, None))
    save(scene.run, 4)
    supervisor = scene.supervisor()
    assert supervisor.after_kill("killed (SIGKILL)") == 0
    last = last_of(scene)
    assert (last.end, last.last_step, last.decision, scene.executor.requeued) == ("cut", 4, "requeue", [()])
    assert "its supervisor was killed (SIGKILL)" in last.why


@pytest.mark.parametrize("before", [None, "requeue"])
def test_one_that_is_killed_at_once_counts_and_does_not_come_back_for_ever(scene, before):
    if before:
        # Of this job's start before: not what this start decided.
        scene.history.write(attempt(0, "stopped", decision=before, last=0, cause="time limit"))
    for number in range(5):
        scene.executor.restart_count = number + 1
        code = scene.supervisor().after_kill("killed (SIGKILL)")
        if code:
            break
    assert code == 1
    assert last_of(scene).decision == "give_up"
    assert len(scene.executor.requeued) == (2 if before else 3)


@pytest.mark.parametrize(("decision", "code", "requeued"), [("finish", 0, 0), ("requeue", 0, 1), ("give_up", 1, 0)])
def test_one_that_is_killed_on_its_way_out_changes_nothing(scene, decision, code, requeued):
    scene.history.write(attempt(0, "stopped", decision=decision, why="so"))
    assert scene.supervisor().after_kill("killed (SIGKILL)") == code
    assert (len(scene.history.read()), len(scene.executor.requeued)) == (1, requeued)


def test_a_stop_that_was_asked_for_meanwhile_holds(scene):
    scene.history.write(attempt(0, None))
    save_request(scene.run.path, Request(action="stop", unix_time_s=time.time()))
    assert scene.supervisor().after_kill("killed (SIGKILL)") == 0
    assert (last_of(scene).decision, scene.executor.requeued) == ("finish", [])


GUARDED = """
import os, signal, sys, time
from piip_scale.launch.guard import leave_guard

def take(number, frame):
    print("took", signal.Signals(number).name, flush=True)
    os._exit(5)

signal.signal(signal.SIGUSR2, take)
leave_guard(lambda how: print(how, flush=True) or 3)
print("up", os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("to_child", "number", "told", "code"), [
    (True, signal.SIGKILL, "killed (SIGKILL)", 3),
    (False, signal.SIGUSR2, "took SIGUSR2", 5),
    (False, signal.SIGKILL, None, -signal.SIGKILL),
])  # fmt: skip
def test_a_guard_hands_on_signals_and_acts_where_its_child_is_killed(to_child, number, told, code):
    guard = subprocess.Popen([sys.executable, "-c", GUARDED], stdout=subprocess.PIPE, text=True)
    child = int(guard.stdout.readline().split()[1])
    os.kill(child if to_child else guard.pid, number)
    rest = guard.communicate(timeout=240)[0]
    assert guard.returncode == code
    assert told is None or told in rest
    until_s = time.monotonic() + 240
    while os.path.exists(f"/proc/{child}/cmdline") and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < until_s
        time.sleep(0.01)
