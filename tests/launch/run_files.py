"""Directories of runs as trainings and jobs leave them."""

from __future__ import annotations

import json
import os
import socket
import time

from piip_scale.launch.attempts import Attempt, History
from piip_scale.launch.queue import QueuedJob
from piip_scale.launch.runs import describe, read_run
from piip_scale.launch.spec import JobFiles, JobSpec, save_spec
from piip_scale.run.heartbeat import Beat
from piip_scale.run.heartbeat import write_beat as write

NOW = time.time()


def make_spec(folder, **changes):
    given = {
        "name": folder.name,
        "run_dir": folder,
        "working_dir": folder.parent,
        "config": folder / "job/frozen/config.py",
        "source_config": folder / "config.py",
        "script": folder / "job/train.sbatch",
        "log": f"{folder}/job/log-%j.txt",
    }
    spec = JobSpec(**given | changes)
    save_spec(spec)
    return spec


def write_status(folder, state, step, note="", seconds_ago=0.0):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"state": state, "step": step, "ending": {"line": note}}
    (folder / "status.json").write_text(json.dumps(content))
    os.utime(folder / "status.json", (NOW - seconds_ago, NOW - seconds_ago))


def write_metrics(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def steps(first, last, step_ms=500.0):
    rate = {"time/step_ms": step_ms, "throughput/images_per_second": 16.0}
    return [{"step": step, "kind": "step", **rate} for step in range(first, last + 1)]


def job(folder, state="RUNNING", **changes):
    given = {"name": "12", "job_id": 12, "array_task": None, "state": state, "reason": "Priority", "time_left": "1:00"}
    return QueuedJob(**given | {"nodes": "n1", "command": str(folder / "job/train.sbatch")} | changes)


def attempt(number=0, started_unix_s=NOW - 100, nodes=("n1",), **changes):
    return Attempt(number, 12, number, nodes, started_unix_s, **changes)


def write_attempt(folder, number=0, **changes):
    History(JobFiles(folder).attempts).write(attempt(number, **changes))


def row(folder, queue=()):
    return describe(read_run(folder, queue))


def beat(**changes):
    given = {"rank": 0, "number": 1, "collectives": 1, "phase": "computing", "step": 3, "waiting_s": 0.0}
    return Beat(**given | {"unix_time_s": time.time(), "host": socket.gethostname(), "pid": os.getpid()} | changes)


def write_beat(folder, **changes):
    (folder / "heartbeats").mkdir(exist_ok=True)
    write(folder / "heartbeats", beat(**changes))
