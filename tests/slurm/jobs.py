"""Jobs of a tiny training on a cluster of real daemons, and what is done to them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from commands import command

from piip_scale.checkpoint.store import CheckpointStore, read_step
from piip_scale.errors import CheckpointError
from piip_scale.launch.attempts import History
from piip_scale.run.heartbeat import read_beats

HOOKS = Path(__file__).with_name("hooks")
PROFILE = """
gpu_request = "none"
cpus_per_rank = 1
signal_lead_s = 30
requeue = {requeue}

[sbatch]
partition = "gpu"

[environment]
OMP_NUM_THREADS = "1"
"""
STEPS, SAVED_AT, HELD_AT = 12, 4, 6
# Asked to stop, ranks that wait do the step that they waited before.
STOPPED_AT = HELD_AT + 1
WAIT_S = 300


def wait_for(what, found, seconds=WAIT_S, every_s=0.05):
    """The first true value that ``found`` returns."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        told = what() if callable(what) else what
        assert time.monotonic() < deadline, f"not within {seconds} s: {told}"
        time.sleep(every_s)
    return value


class Cluster:
    """The daemons of ``launch/minislurm``."""

    def __init__(self, folder: Path, environment: Mapping[str, str] = os.environ) -> None:
        self.environment = dict(environment) | {"SLURM_CONF": str(folder / "slurm.conf"), "COLUMNS": "200"}
        self.folder = folder
        self._restart: list[str] = []

    def run(self, *words, check=True) -> str:
        done = subprocess.run(
            list(map(str, words)), capture_output=True, text=True, env=self.environment, timeout=60, check=False
        )
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def state(self, job_id: int) -> str:
        return self.field(job_id, "JobState")

    def field(self, job_id: int, name: str) -> str:
        shown = self.run("scontrol", "show", "job", "-o", job_id)
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))

    def take_down(self, node: str) -> None:
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def kill_daemons(self, node: str) -> None:
        """slurmd of a node, then everything of its steps, as if somebody had pulled the plug."""
        daemon = int((self.folder / f"slurmd-{node}.pid").read_text())
        os.kill(daemon, signal.SIGKILL)
        mine = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        for pid, environment, parent in _processes():
            if mine in environment and f"SLURMD_NODENAME={node}".encode() in environment:
                for each in {pid, parent} if _name(parent) == "slurmstepd" else {pid}:
                    with suppress(ProcessLookupError):
                        os.kill(each, signal.SIGKILL)
        self._restart.append(node)

    def heal(self) -> None:
        """Brings back what a test broke."""
        for node in self._restart:
            path = os.environ["PATH"] + ":/usr/sbin:/sbin"
            subprocess.run(["slurmd", "-N", node], env=self.environment | {"PATH": path}, timeout=30, check=True)
        self._restart.clear()
        for node, state in self._states().items():
            if state.startswith(("down", "drain")):
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        wait_for("all nodes idle", lambda: set(self._states().values()) == {"idle"})

    def _states(self) -> dict[str, str]:
        lines = self.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %T").splitlines()
        return dict(line.split() for line in lines)


class Job:
    """One run, submitted as a user would."""

    def __init__(self, cluster: Cluster, config: Path, folder: Path) -> None:
        self.cluster, self.config, self.folder = cluster, config, folder
        self.run_dir = folder / "a run's directory"
        self.hold, self.pause = folder / "hold", folder / "pause"
        self.hold.touch()
        self.job_id, self.ranks_per_node = 0, 1
        self._witness: Witness | None = None
        self._harmed_unix_s, self._released_unix_s = 0.0, 0.0

    @staticmethod
    def settings(**more) -> list[str]:
        values = {
            "train.steps": STEPS,
            "train.log_every_steps": 1,
            "train.checkpoint_every_steps": SAVED_AT,
            "train.evaluate_every_steps": 0,
            # Starting a loader takes as long as the whole training; the tests of signals have some.
            "data.workers": 0,
        } | {key.replace("__", "."): value for key, value in more.items()}
        return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]

    def environment(self, **more: str) -> dict[str, str]:
        paths = [str(HOOKS), os.environ.get("PYTHONPATH", "")]
        ours = {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "OMP_NUM_THREADS": "1",
            "PIIP_TEST_HOLD": str(self.hold),
            "PIIP_TEST_HOLD_AT": str(HELD_AT),
        }
        return self.cluster.environment | ours | more

    def command(self, *words, code=0, **more: str) -> str:
        """One of our commands; what it printed."""
        done = subprocess.run(
            command(*words), capture_output=True, text=True, env=self.environment(**more), timeout=120, check=False
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    def submit(self, *words, requeue=True, settings=None, **more: str) -> None:
        """Submits it; two nodes of one rank each."""
        profile = self.folder / "site.toml"
        profile.write_text(PROFILE.format(requeue=str(requeue).lower()))
        options = ["--nodes", 2, "--gpus-per-node", 1, "--profile", profile, "--run-dir", self.run_dir]
        self.command("submit", self.config, *options, *(settings or self.settings()), *words, **more)
        self.job_id = self.newest_job()
        self._witness = self._witness or Witness(self.run_dir)

    def start(self, *options, spares=0, look=False, settings=None) -> None:
        """The same by a batch script of a few lines, without a look at the nodes: half the processes to wait for."""
        (self.run_dir / "job").mkdir(parents=True)
        script = self.folder / "by_hand.sbatch"
        script.write_text(f'#!/bin/bash\ntrap "" USR2\nexec {shlex.join(command("supervise"))} "$@"\n')
        words = [self.config, "--run-dir", self.run_dir, "--ranks-per-node", self.ranks_per_node, "--spares", spares]
        words += [] if look else ["--no-preflight"]
        asked = ["--requeue", f"-N{2 + spares}", f"--ntasks-per-node={self.ranks_per_node}"]
        asked += ["--open-mode=append", "--signal=B:USR2@30"]
        asked += ["--no-kill"] * bool(spares) + ["-o", self.run_dir / "job" / "log-%j.txt", *options]
        cluster = Cluster(self.cluster.folder, self.environment())
        told = cluster.run("sbatch", "--parsable", *asked, script, *words, *(settings or self.settings()))
        self.job_id = int(told)
        self._witness = self._witness or Witness(self.run_dir)

    def newest_job(self) -> int:
        return int(self.newest_name())

    def newest_name(self) -> str:
        """As Slurm's commands take it: ``12``, or ``12_3`` for a task of an array."""
        lines = (self.run_dir / "job" / "submitted.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["job"]

    def bad_nodes(self) -> dict:
        path = self.run_dir / "job" / "bad_nodes.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def log_of_array(self) -> str:
        texts = [path.read_text(errors="replace") for path in sorted((self.run_dir.parent / "job").glob("log-*.txt"))]
        return "\n".join(text[-2000:] for text in texts) + self.cluster.run("squeue", check=False)

    def close(self) -> None:
        """Ends what a failed test may have left."""
        if self._witness:
            self._witness.stop()
        self.cluster.run("scancel", "--full", "--user", str(os.getuid()), check=False)
        wait_for("an empty queue", lambda: not self.cluster.run("squeue", "-h", "-o", "%i").strip(), 60)

    def go_on(self) -> None:
        self.hold.unlink()

    def harmed(self) -> None:
        """From now on the time counts."""
        self._harmed_unix_s = time.time()

    def until_released(self) -> None:
        """Slurm may give the nodes to others."""
        wait_for(self.log, lambda: self.cluster.state(self.job_id) not in ("RUNNING", "COMPLETING"))
        self._released_unix_s = time.time()

    def until_held(self) -> None:
        """All ranks wait after the sixth step, and the checkpoint of the fourth is there."""
        # A rank's own mark, since what the file of metrics says comes from another.
        held = [HELD_AT] * (2 * self.ranks_per_node)
        wait_for(self.log, lambda: [beat["step"] for beat in self.beats()] == held)
        wait_for(self.log, lambda: CheckpointStore(self.run_dir / "checkpoints", keep=9).steps() == [SAVED_AT])

    def beats(self) -> list[dict]:
        beats = read_beats(self.run_dir / "heartbeats", 0.0)
        return [asdict(beat) for beat in sorted(beats, key=lambda beat: beat.rank)]

    def pid(self, rank: int) -> int:
        return self.beats()[rank]["pid"]

    def supervisor_pid(self) -> int:
        """The supervisor's own process, and not its guard's, which Slurm started."""
        return self.supervisor_pids()[0]

    def supervisor_pids(self) -> tuple[int, int]:
        """The supervisor's process, and its guard's."""
        mine = f"SLURM_JOB_ID={self.job_id}".encode()
        found = {pid: parent for pid, environment, parent in _processes() if mine in environment and _supervises(pid)}
        return next((pid, parent) for pid, parent in found.items() if parent in found)

    def attempts(self):
        return History(self.run_dir / "job" / "attempts.jsonl").read()

    def ended(self, number: int):
        """An attempt, once it has ended and been decided upon."""

        def found():
            attempts = self.attempts()
            return attempts[number] if len(attempts) > number and attempts[number].decision else None

        return wait_for(self.log, found)

    def status(self) -> dict:
        return json.loads((self.run_dir / "status.json").read_text())

    def finished(self):
        """All attempts, once nothing runs or waits any more."""
        wait_for(self.log, lambda: self.attempts() and self.attempts()[-1].decision in ("finish", "give_up"))
        wait_for(self.log, lambda: not self.cluster.run("squeue", "-h", "-o", "%i").strip())
        return self.attempts()

    def log(self) -> str:
        texts = [path.read_text(errors="replace") for path in sorted((self.run_dir / "job").glob("log-*.txt"))]
        return "\n".join(texts)[-6000:] + self.cluster.run("squeue", check=False)

    def lines(self) -> list[str]:
        """What the supervisor said."""
        texts = [path.read_text(errors="replace") for path in sorted((self.run_dir / "job").glob("log-*.txt"))]
        return [line for text in texts for line in text.splitlines() if " supervise: " in line]

    @staticmethod
    def told(run_dir: Path) -> dict[int, dict[str, float]]:
        """What each step's line says that does not depend on the machine."""
        lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        return {
            line["step"]: {key: value for key, value in line.items() if key.startswith(("loss/", "train/"))}
            for line in lines
            if line["kind"] == "step"
        }

    def check_whole(self, whole) -> None:
        """The run is done, step for step what it would have been, and no checkpoint was ever lost or half there."""
        assert self.status()["state"] == "done", self.log()
        assert len(whole) == STEPS
        assert self.told(self.run_dir) == whole
        store = CheckpointStore(self.run_dir / "checkpoints", keep=2)
        assert len(store.steps()) == 2
        assert store.steps()[-1] == STEPS
        for step in store.steps():
            store.validate(store.path(step))
        assert [path.name for path in store.folder.iterdir() if path.name.startswith(".")] == []
        self._witness.stop()
        assert self._witness.faults == []
        assert self._witness.looks > 10
        self._record(os.environ.get("PIIP_SLURM_FIGURES"))

    def _record(self, path: str | None) -> None:
        """One row of benchmarks/slurm.md."""
        first, *others = self.attempts()
        if not path or not others or not self._harmed_unix_s:
            return
        # Attempts that found no nodes to train on left nothing to see.
        last = others[-1]
        new = min(at for at, step in self._witness.steps if at > last.started_unix_s and step == last.first_step + 1)
        seconds = [first.ended_unix_s - self._harmed_unix_s, self._released_unix_s - self._harmed_unix_s]
        seconds += [last.started_unix_s - first.ended_unix_s, new - last.started_unix_s]
        name = os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split(" ")[0].removeprefix("test_").replace("_", " ")
        told = [f"{value:.1f}" if value >= 0 else "" for value in seconds]
        cells = [name, *told, str(max(HELD_AT - last.first_step, 0))]
        with Path(path).open("a") as file:
            file.write(f"| {' | '.join(cells)} |\n")


class Witness(threading.Thread):
    """Looks at the checkpoints all the time: each that is visible is whole, and the newest never gets older."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(daemon=True)
        self.faults: list[str] = []
        self.looks = 0
        self.steps: list[tuple[float, int]] = []
        self._metrics = run_dir / "metrics.jsonl"
        self._store = CheckpointStore(run_dir / "checkpoints", keep=9)
        self._ended = threading.Event()
        self.start()

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        newest = 0
        while not self._ended.wait(0.05):
            self.looks += 1
            self._note_step()
            steps = self._store.steps()
            for step in steps:
                with suppress(FileNotFoundError):
                    self._look(step)
            if (steps and steps[-1] < newest) or (newest and not steps):
                self.faults.append(f"step {newest} was there, now {steps}")
            newest = max([newest, *steps])

    def _note_step(self) -> None:
        with suppress(OSError, ValueError, IndexError, KeyError):
            told = json.loads(self._metrics.read_text().splitlines()[-1])["step"]
            if not self.steps or self.steps[-1][1] != told:
                self.steps.append((time.time(), told))

    def _look(self, step: int) -> None:
        try:
            assert read_step(self._store.path(step)) == step
        except CheckpointError as error:
            # Pruned between two looks.
            if self._store.path(step).exists():
                self.faults.append(error.line)


def _processes():
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                environment = set((folder / "environ").read_bytes().split(b"\0"))
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                yield int(folder.name), environment, parent


def _supervises(pid: int) -> bool:
    with suppress(OSError):
        return b"supervise" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""
