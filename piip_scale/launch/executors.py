"""Where a job's processes run: under Slurm, or on this machine alone; the supervisor sees no difference."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

from piip_scale.launch.spec import JobSpec
from piip_scale.launch.step_notes import StepNotes, is_note, read_notes
from piip_scale.launch.time_left import USUAL_KILL_WAIT_S, JobTime
from piip_scale.run.heartbeat import STACK_SIGNAL, read_beats
from piip_scale.world import node_name

LostNodes = tuple[tuple[str, str], ...]


class Step(Protocol):
    """Processes that were started together and end together."""

    def poll(self) -> int | None:
        """The exit code; ``None`` while it runs."""
        ...

    def ask_to_stop(self) -> None:
        """Asks every rank to save and stop."""
        ...

    def ask_for_stacks(self) -> None:
        """Has every rank that can still be reached write its stack."""
        ...

    def end(self) -> None:
        """Ends all processes on all nodes now."""
        ...

    def notes(self) -> StepNotes:
        """The launcher's lines about the step, apart from those of its ranks."""
        ...


class Executor(Protocol):
    """Starts steps on nodes.

    Attributes:
        job_id: Slurm's job; 0 without one.
        restart_count: How often it was requeued.
        has_queue: Whether it can go back into a queue, or have a successor.
    """

    job_id: int
    restart_count: int
    has_queue: bool

    def allocated(self) -> tuple[str, ...]:
        """The job's nodes, in order."""
        ...

    def lost(self, nodes: Sequence[str]) -> LostNodes:
        """Which of some nodes are no longer the job's or no longer there, each with a line of why."""
        ...

    def down(self, nodes: Sequence[str]) -> LostNodes:
        """Which of some nodes, whosever they are now, nothing can be started on."""
        ...

    def doubtful(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Which of some nodes somebody wants emptied: better used last."""
        ...

    def start(self, args: Sequence[str], nodes: Sequence[str], tasks_per_node: int, number: int, beats: Path) -> Step:
        """Starts a command of ours on nodes.

        Args:
            args: Its subcommand and what follows it.
            nodes: Where.
            tasks_per_node: Processes on each.
            number: Of the start within the job: two in a row do not share a port.
            beats: Folder of the ranks' heartbeats.
        """
        ...

    def why_ending(self) -> str:
        """Why the job ends: ``preemption``, ``time limit``, ``requeue``, ``cancel``; empty where it does not."""
        ...

    def job_time(self) -> JobTime | None:
        """How long the job may run, and still will; ``None`` where it has no limit, or nobody knows."""
        ...

    def kill_wait_s(self) -> float:
        """How long a job's processes have from the TERM that ends it to KILL."""
        ...

    def is_running(self, job_id: int) -> bool:
        """Whether another job still runs."""
        ...

    def end_chain(self) -> None:
        """Takes back what was to follow this job; called where a person has to look first."""
        ...

    def requeue(self, exclude: Sequence[str]) -> str:
        """Has the job, or one after it, go on later and without some nodes; returns one line about what was done.

        Raises:
            SlurmError: There is no way.
        """
        ...


class ProcessStep:
    """A step behind one process of this machine, whose standard error is handed on line by line.

    Args:
        command: What to run.
        environment: For it.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(command, env=dict(environment), stderr=subprocess.PIPE)
        self._noted: list[str] = []
        self._reader = threading.Thread(target=self._hand_on, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    def _hand_on(self, stream: IO[bytes]) -> None:
        for raw in stream:
            sys.stderr.buffer.write(raw)
            sys.stderr.flush()
            line = raw.decode("utf-8", errors="replace").rstrip("\n")
            if is_note(line):
                self._noted.append(line)

    def poll(self) -> int | None:
        """The exit code; ``None`` while it runs."""
        code = self.process.poll()
        if code is not None:
            # A process that outlives its parent may keep the pipe open.
            self._reader.join(timeout=5)
        return code

    def signal(self, number: int) -> None:
        """Sends a signal to the one process."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def ask_to_stop(self) -> None:
        """Asks every rank to save and stop: who started them passes it on."""
        self.signal(signal.SIGUSR2)

    def end(self) -> None:
        """Ends the process now."""
        self.signal(signal.SIGKILL)

    def notes(self) -> StepNotes:
        """The launcher's lines about the step, apart from those of its ranks."""
        return read_notes(self._noted)


class LocalStep(ProcessStep):
    """Ranks of this machine; they do not outlive the process that started them."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], beats: Path) -> None:
        super().__init__(command, environment)
        self._beats = beats

    def ask_for_stacks(self) -> None:
        """A stopped process takes signals once it goes on."""
        for beat in read_beats(self._beats, 0.0):
            for number in (STACK_SIGNAL, signal.SIGCONT):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(beat.pid, number)


class LocalExecutor:
    """This machine, without Slurm: the same supervision for somebody on a laptop.

    Args:
        spec: The job.
    """

    job_id, restart_count, has_queue = 0, 0, False

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec

    def allocated(self) -> tuple[str, ...]:
        """This machine."""
        return (node_name(),)

    def lost(self, nodes: Sequence[str]) -> LostNodes:
        """None: this process would be lost with them."""
        return ()

    down = lost

    def doubtful(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """None: there is no other."""
        return ()

    def start(self, args: Sequence[str], nodes: Sequence[str], tasks_per_node: int, number: int, beats: Path) -> Step:
        """Starts one process, which starts its ranks itself."""
        procs = [f"--procs={tasks_per_node}"] if args[0] == "train" else []
        command = [*self._spec.rank_command, *args, *procs]
        return LocalStep(command, with_code(self._spec, os.environ), beats)

    def why_ending(self) -> str:
        """Nobody but the user ends a local job."""
        return ""

    def job_time(self) -> JobTime | None:
        """No limit."""
        return None

    def kill_wait_s(self) -> float:
        """Nobody ends a local job in two steps."""
        return USUAL_KILL_WAIT_S

    def is_running(self, job_id: int) -> bool:
        """There are no jobs."""
        return False

    def end_chain(self) -> None:
        """Nothing follows."""

    def requeue(self, exclude: Sequence[str]) -> str:
        """Never called: there is no queue."""
        raise AssertionError("a local job has no queue")


def with_code(spec: JobSpec, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the job's processes: the frozen copy of the package comes first."""
    if spec.code_dir is None:
        return dict(environment)
    paths = [str(spec.code_dir), environment.get("PYTHONPATH", "")]
    return dict(environment) | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
