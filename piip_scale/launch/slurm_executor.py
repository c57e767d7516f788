"""Steps of a Slurm job: srun with the options that keep one rank's end from going unnoticed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from piip_scale.errors import SlurmError
from piip_scale.launch.compile_caches import LOCAL_CACHE
from piip_scale.launch.executors import LostNodes, ProcessStep, Step, with_code
from piip_scale.launch.job_log import log_line
from piip_scale.launch.queue import submit_script
from piip_scale.launch.slurm_commands import Slurm
from piip_scale.launch.slurm_records import JobRecord, NodeRecord, usable_nodes
from piip_scale.launch.spec import JobSpec
from piip_scale.launch.submitting import note_submitted
from piip_scale.launch.time_left import USUAL_KILL_WAIT_S, JobTime
from piip_scale.logging import get_logger
from piip_scale.run.heartbeat import STACK_SIGNAL
from piip_scale.world import Allocation, World, given_meeting_point, rendezvous_port, step_environment

# Why a job ends whose processes still run, where its state has it already.
_CAUSES = {"TIMEOUT": "time limit", "DEADLINE": "time limit", "PREEMPTED": "preemption", "CANCELLED": "cancel"}
# Whose ranks are nothing without each other.
_TOGETHER = ("train", "evaluate")
# Slurm's KillWait and UnkillableStepTimeout as they come: 30 and 60 s.
_KILLED_WITHIN_S, _LOOK_AGAIN_S = 120.0, 5.0


def srun_command(
    spec: JobSpec, nodes: Sequence[str], tasks_per_node: int, cpus_per_task: int | None, *, alone: bool
) -> list[str]:
    """The srun of a step, up to the program.

    Args:
        spec: The job.
        nodes: Where.
        tasks_per_node: Processes on each.
        cpus_per_task: Cores of each; srun no longer takes them from the batch job by itself.
        alone: The end of one process, or of a node, does not end the others.
    """
    command = ["srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes) * tasks_per_node}"]
    command += [f"--ntasks-per-node={tasks_per_node}", f"--nodelist={','.join(nodes)}", "--export=ALL", "--unbuffered"]
    command += [f"--cpus-per-task={cpus_per_task}"] * bool(cpus_per_task)
    # Overlapping: the training's step need not wait until a node that is gone has let go of this one.
    apart, together = ["--kill-on-bad-exit=0", "--no-kill", "--overlap"], ["--kill-on-bad-exit=1", "--no-kill=off"]
    return [*command, *(apart if alone else together), *spec.srun_options]


class SlurmStep(ProcessStep):
    """A step of a job, behind its srun."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], slurm: Slurm, job: str) -> None:
        super().__init__(command, environment)
        self._slurm, self._job = slurm, job

    def ask_for_stacks(self) -> None:
        """Not by srun, which passes on only signals of its own choice."""
        for number in (int(STACK_SIGNAL), int(signal.SIGCONT)):
            with suppress(SlurmError):
                for step_id in self._slurm.step_ids(self._job)[-1:]:
                    self._slurm.signal_step(self._job, step_id, number)

    def end(self) -> None:
        """Srun takes TERM as a request to kill all tasks."""
        self.signal(signal.SIGTERM)


class SlurmExecutor:
    """The allocation of the batch job that this process belongs to.

    Args:
        spec: The job as it was meant.
        allocation: The job as it is.
        slurm: The commands.
    """

    has_queue = True

    def __init__(self, spec: JobSpec, allocation: Allocation, slurm: Slurm) -> None:
        self.job_id, self.restart_count = allocation.job_id, allocation.restart_count
        # Every command is about this one: of an array, about this one task.
        self._name = allocation.name
        self._spec, self._allocation, self._slurm = spec, allocation, slurm

    def job_time(self) -> JobTime | None:
        """The controller's record, which has a partition's default too, and what somebody changed."""
        try:
            job = self._slurm.job_now(self._name)
        except SlurmError:
            return None
        return time_of(job, time.time())

    def kill_wait_s(self) -> float:
        """As the site has set it; as it comes, where the controller does not answer."""
        with suppress(SlurmError):
            return self._slurm.kill_wait_s()
        return USUAL_KILL_WAIT_S

    def allocated(self) -> tuple[str, ...]:
        """The job's nodes, in order."""
        return self._slurm.hostnames(self._allocation.node_list)

    def lost(self, nodes: Sequence[str]) -> LostNodes:
        """Which are down, or were taken from the job because they were."""
        down, job = dict(self.down(nodes)), self._slurm.job(self._name)
        # A job that is on its way back into the queue has none any more.
        has_nodes = job.state == "RUNNING" and job.restarts == self.restart_count
        own = self._slurm.hostnames(job.node_list) if has_nodes else nodes
        taken = {node: f"node {node} was lost: Slurm took it from the job" for node in nodes if node not in own}
        return tuple((taken | down).items())

    def down(self, nodes: Sequence[str]) -> LostNodes:
        """Which Slurm calls down, failing or out of reach."""
        records = self._slurm.nodes(nodes)
        lost = [record for record in records.values() if record.is_lost]
        return tuple((record.name, f"node {record.name} was lost: {record.line}") for record in lost)

    def doubtful(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Which are being drained."""
        return tuple(record.name for record in self._slurm.nodes(nodes).values() if record.is_doubtful)

    def start(self, args: Sequence[str], nodes: Sequence[str], tasks_per_node: int, number: int, beats: Path) -> Step:
        """Starts one step."""
        together = args[0] in _TOGETHER
        command = srun_command(
            self._spec,
            nodes,
            tasks_per_node,
            self._allocation.cpus_per_task if together else None,
            alone=not together,
        )
        environment = step_environment(with_code(self._spec, os.environ))
        environment |= self._meeting_point(nodes, tasks_per_node, number)
        if self._spec.local_cache:
            environment[LOCAL_CACHE] = self._spec.local_cache
        return SlurmStep([*command, *self._spec.rank_command, *args], environment, self._slurm, self._name)

    def _meeting_point(self, nodes: Sequence[str], tasks_per_node: int, number: int) -> dict[str, str]:
        records = self._slurm.nodes(nodes[:1])
        # Where Slurm itself reaches the node: its name need not be one that resolves.
        address = records[nodes[0]].address if nodes[0] in records else nodes[0]
        world = World(num_ranks=1, master_address=address, master_port=rendezvous_port(self.job_id, number))
        given = given_meeting_point(self._spec.site_variables, os.environ)
        for name, value in given.items():
            log_line(f"{name}={value}, as the profile sets it")
        names = world.as_environment() | given
        # Each task of a step finds its own rank; the single task of one does not look for any.
        alone = len(nodes) * tasks_per_node == 1
        return names if alone else {name: value for name, value in names.items() if name.startswith("MASTER")}

    def why_ending(self) -> str:
        """By the controller's record of the job."""
        try:
            job = self._slurm.job(self._name)
        except SlurmError:
            return ""
        return ending(job, self.restart_count)

    def is_running(self, job_id: int) -> bool:
        """Whether another job still runs; one that the controller has forgotten does not.

        Of a job that is completing, Slurm kills the processes; what may take days is a node that cannot be cleaned up.
        So that is waited for, but not for long.
        """
        while True:
            try:
                job = self._slurm.job(job_id)
            except SlurmError:
                return False
            is_fresh = job.end_unix_s is None or time.time() - job.end_unix_s < _KILLED_WITHIN_S
            if job.state != "COMPLETING" or not is_fresh:
                return job.state in ("RUNNING", "SUSPENDED", "CONFIGURING")
            time.sleep(_LOOK_AGAIN_S)

    def requeue(self, exclude: Sequence[str]) -> str:
        """Puts this job back into the queue; where the site does not let it, has another follow it."""
        job = self._slurm.job(self._name)
        exclude = self._affordable(exclude, job)
        if job.restarts > self.restart_count:
            return "Slurm has put the job back into the queue itself" + self._try_restrict(exclude, job)
        if self._spec.requeue:
            try:
                self._slurm.requeue(self._name)
            except SlurmError as error:
                get_logger(__name__).warning("%s; a successor is submitted instead", error.line)
            else:
                return f"job {self._name} is back in the queue" + self._try_restrict(exclude, job)
        return self._succeed(exclude, job)

    def end_chain(self) -> None:
        """Jobs that were submitted to follow this one would only meet the same."""
        following = self._slurm.successors(self._name, self._spec.name)
        # Each waits for the one before.
        while following:
            log_line(f"job {', '.join(following)}, which was to follow, is taken out of the queue")
            after = [job for each in following for job in self._slurm.successors(each, self._spec.name)]
            self._slurm.cancel(following)
            following = after

    def _try_restrict(self, exclude: Sequence[str], job: JobRecord) -> str:
        if not exclude:
            return ""
        try:
            self._slurm.restrict(self._name, *restricted(job, exclude))
        except SlurmError as error:
            return f", and may get {', '.join(exclude)} again: {error.line}"
        return f", without {', '.join(exclude)}"

    def _succeed(self, exclude: Sequence[str], job: JobRecord) -> str:
        without = f", without {', '.join(exclude)}" if exclude else ""
        waiting = self._slurm.successors(self._name, self._spec.name)
        if waiting:
            for name in waiting[:1] if exclude else ():
                self._slurm.restrict(name, *restricted(self._slurm.job(name), exclude))
            return f"job {waiting[0]}, which waits for this one, goes on{without}"
        if self._spec.script is None:
            raise SlurmError(
                "this job cannot be requeued here, and its script is not known",
                fix="submit it again by hand; `piip-scale submit` keeps the script for such sites",
            )
        options = successor_options(self._name, job, exclude)
        options += [] if self._spec.array_task is None else [f"--array={self._spec.array_task}"]
        successor = submit_script(self._spec.script, self._spec.working_dir, options)
        note_submitted(self._spec, successor)
        return f"job {successor} follows this one{without}"

    def _affordable(self, exclude: Sequence[str], job: JobRecord) -> tuple[str, ...]:
        """None of the nodes where too few would be left: the job would wait for ever."""
        if not exclude:
            return ()
        left = [node.name for node in self._serviceable(job) if node.name not in exclude]
        if len(left) >= self._spec.nodes_to_ask:
            return tuple(exclude)
        get_logger(__name__).warning(
            "%s should be left out, but only %d other nodes are in service for this job", ", ".join(exclude), len(left)
        )
        return ()

    def _serviceable(self, job: JobRecord) -> list[NodeRecord]:
        """Nodes that Slurm could give to this job by and by."""
        cpus = self._spec.ranks_per_node * (self._allocation.cpus_per_task or 1)
        every = self._slurm.all_nodes().values()
        nodes = usable_nodes(every, job.partitions, job.features, cpus, self._spec.gpus_per_node)
        reserved = self._slurm.reserved_nodes(job.reservation) if job.reservation else None
        return [
            node
            for node in nodes
            if node.name not in job.excluded
            and not (node.is_lost or node.is_doubtful)
            and (reserved is None or node.name in reserved)
        ]


def restricted(job: JobRecord, exclude: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The nodes that a job must not get, its user's own among them, and those that it must get where that changes.

    A node that is lost must not be one that the job must get, or it would wait for it.
    """
    excluded = tuple(dict.fromkeys([*job.excluded, *exclude]))
    required = tuple(node for node in job.required if node not in exclude)
    return excluded, required if required != job.required else None


def successor_options(name: str, job: JobRecord, exclude: Sequence[str]) -> list[str]:
    """Options of sbatch for a job that goes on where one ends, beside those in its script.

    Args:
        name: The one that ends.
        job: What the controller knows of it.
        exclude: Nodes to leave out.
    """
    excluded, required = restricted(job, exclude)
    options = [f"--dependency=afterany:{name}", *([f"--exclude={','.join(excluded)}"] if excluded else [])]
    options += [] if required is None else [f"--nodelist={','.join(required)}"]
    # A relative one would begin anew.
    return options + ([f"--deadline={job.deadline}"] if job.deadline else [])


def time_of(job: JobRecord, now_unix_s: float) -> JobTime | None:
    """The time of a job, which ends at its limit or at its deadline; ``None`` where it has neither."""
    ends: list[float] = [] if job.limit_s is None else [job.limit_s - job.run_s]
    ends += [] if job.deadline_unix_s is None else [job.deadline_unix_s - now_unix_s]
    if not ends:
        return None
    left_s = max(min(ends), 0.0)
    return JobTime(job.run_s + left_s if job.limit_s is None else job.limit_s, left_s)


def ending(job: JobRecord, restart_count: int) -> str:
    """Why a job ends, from the controller's record of it while its processes still run.

    Args:
        job: The record.
        restart_count: How often it had been requeued when it started.
    """
    if job.restarts > restart_count:
        return "preemption" if job.is_preempted else "requeue"
    if job.is_preempted:
        return "preemption"
    if job.state in _CAUSES:
        return _CAUSES[job.state]
    if job.state != "COMPLETING":
        return ""
    # Completing with processes alive means that Slurm ends them: because the time is over, or somebody ran scancel.
    return "time limit" if job.limit_s is not None and job.run_s >= job.limit_s - 2 else "cancel"
