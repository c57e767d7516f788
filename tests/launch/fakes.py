"""A cluster that is only told about: what steps do to a run's directory, without a process."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.errors import SlurmError
from piip_scale.launch.node_facts import NodeFacts, save_facts
from piip_scale.launch.spec import JobSpec
from piip_scale.launch.step_notes import StepNotes, read_notes
from piip_scale.run.heartbeat import Beat, write_beat
from piip_scale.run.run_dir import RunDirectory

GIB = 2**30


def spec(folder: Path, **more) -> JobSpec:
    config = folder / "config.py"
    config.write_text("")
    values = {"name": "job", "run_dir": folder / "run", "working_dir": folder, "config": config}
    return JobSpec(**values | {"source_config": config, "num_nodes": 2} | more)


def save(run: RunDirectory, step: int) -> None:
    store = CheckpointStore(run.checkpoints, keep=9)
    (store.begin(step) / "weights").write_text(str(step))
    store.commit(step)


def beat(run: RunDirectory, rank: int, step: int = 3, **more) -> None:
    values = {"number": 9, "collectives": 20, "phase": "computing", "waiting_s": 0.0, "limit_s": 600.0}
    values |= {"unix_time_s": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    write_beat(run.heartbeats, Beat(rank=rank, step=step, **values | more))


class FakeStep:
    """Does one thing when looked at, another when asked to stop."""

    def __init__(self, on_poll, on_stop, notes=()) -> None:
        self.asked, self.stacks, self.ended = 0, 0, 0
        self.code = None
        self._on_poll, self._on_stop, self._notes = on_poll, on_stop, notes

    def poll(self):
        if self.code is None:
            self.code = self._on_poll()
        return self.code

    def ask_to_stop(self) -> None:
        self.asked += 1
        self.code = self._on_stop()

    def ask_for_stacks(self) -> None:
        self.stacks += 1

    def end(self) -> None:
        self.ended += 1
        self.code = 143

    def notes(self) -> StepNotes:
        return read_notes(self._notes)


class FakeExecutor:
    """Starts the steps that a test lined up; every node answers its preflight."""

    def __init__(self, run_dir: Path, *steps, nodes=("n1", "n2"), has_queue=True) -> None:
        self.job_id, self.restart_count, self.has_queue = 7, 0, has_queue
        self.run = RunDirectory(run_dir)
        self.steps, self.nodes = list(steps), nodes
        self.started: list[tuple[list[str], tuple[str, ...]]] = []
        self.down_nodes: dict[str, str] = {}
        self.sick_nodes: dict[str, dict] = {}
        self.requeued: list[tuple[str, ...]] = []
        self.refusal, self.chain_ended = "", False
        self.drained: set[str] = set()
        self.reason = ""
        self.known_time = None
        self.running_jobs: set[int] = set()

    def allocated(self):
        return self.nodes

    def lost(self, nodes):
        return tuple((node, self.down_nodes[node]) for node in nodes if node in self.down_nodes)

    down = lost

    def doubtful(self, nodes):
        return tuple(node for node in nodes if node in self.drained)

    def start(self, words, nodes, tasks_per_node, number, beats):
        if words[0] == "preflight-node":
            return FakeStep(lambda: self._answer(Path(words[1]), nodes), lambda: 0)
        self.started.append((list(words), tuple(nodes)))
        return self.steps.pop(0)

    def _answer(self, folder, nodes):
        for node in nodes:
            healthy = {"memory_bytes": 64 * GIB, "free_disk_bytes": {"/tmp": 9 * GIB}, "unix_time_s": time.time()}
            save_facts(folder, NodeFacts(node=node, **healthy | self.sick_nodes.get(node, {})))
        return 0

    def why_ending(self):
        return self.reason

    def job_time(self):
        return self.known_time

    def is_running(self, job_id):
        return job_id in self.running_jobs

    def end_chain(self):
        self.chain_ended = True

    def requeue(self, exclude):
        if self.refusal:
            raise SlurmError(self.refusal)
        self.requeued.append(tuple(exclude))
        return "requeued"
