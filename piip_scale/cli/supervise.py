"""``piip-scale supervise`` and ``preflight``: what a job runs around its training."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from piip_scale.cli.options import ConfigPath, Overrides
from piip_scale.errors import ConfigError, WorldError
from piip_scale.logging import configure_logging
from piip_scale.world import read_allocation

if TYPE_CHECKING:
    from piip_scale.launch.executors import Executor
    from piip_scale.launch.spec import JobSpec
    from piip_scale.world import Allocation

RunDir = Annotated[Path, typer.Option(help="The run's directory.")]
Ranks = Annotated[int | None, typer.Option(min=1, help="Processes of a node; default: as the job asked, one per GPU.")]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(supervise)
    app.command()(preflight)
    app.command("preflight-node", hidden=True)(preflight_node)


def supervise(
    run_dir: RunDir,
    config: Annotated[Path | None, typer.Argument(help="Config; default: that of the submitted job.")] = None,
    ranks_per_node: Ranks = None,
    spares: Annotated[int, typer.Option(min=0, help="Nodes of the allocation that wait to replace a lost one.")] = 0,
    max_stale_restarts: Annotated[
        int, typer.Option(min=0, help="So many restarts in a row may bring no newer checkpoint.")
    ] = 3,
    signal_lead_s: Annotated[int, typer.Option(min=0, help="Seconds from Slurm's USR2 to the time limit.")] = 300,
    preflight: Annotated[bool, typer.Option(help="Look at every node before each attempt.")] = True,
    preflight_seconds: Annotated[float, typer.Option(min=1, help="A node that takes longer fails.")] = 180.0,
    overrides: Overrides = None,
) -> None:
    """Train until it is done: starts the ranks, has them save before the time is over, and starts them again.

    What a batch job runs, inside its allocation; without Slurm it looks after the processes of this machine. Each
    attempt, how it ended and what follows is a line of `job/attempts.jsonl` in the run directory.

    Example: `piip-scale supervise configs/demo/digits.py --run-dir runs/mine --ranks-per-node 2`
    """
    from piip_scale.launch.guard import leave_guard
    from piip_scale.launch.spec import save_spec
    from piip_scale.launch.supervisor import Supervisor, SupervisorSettings
    from piip_scale.launch.watching import StopRequests
    from piip_scale.run.run_dir import RunDirectory

    configure_logging()
    run_dir = run_dir.absolute()
    if config is None:
        spec = _submitted(run_dir)
    else:
        more = {"spares": spares, "max_stale_restarts": max_stale_restarts, "signal_lead_s": signal_lead_s}
        spec = _by_hand(config, overrides or [], run_dir, ranks_per_node, **more)
        save_spec(spec)
    executor = _executor(spec)
    requests = StopRequests(RunDirectory(run_dir), executor.why_ending, executor.kill_wait_s)
    requests.install()
    settings = SupervisorSettings(preflight=preflight, preflight_s=preflight_seconds)
    supervisor = Supervisor(spec, executor, requests, settings)
    # In a batch job; at a terminal there is somebody to see it.
    if executor.has_queue and not (sys.stdin and sys.stdin.isatty()):
        leave_guard(supervisor.after_kill)
    code = supervisor.run()
    # At once: Slurm may be waiting for this process to be gone, and a thread still reads what srun reports.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def preflight(
    config: ConfigPath,
    ranks_per_node: Ranks = None,
    seconds: Annotated[float, typer.Option(min=1, help="A node that takes longer fails.")] = 180.0,
    overrides: Overrides = None,
) -> None:
    """Look at every node of this allocation, or at this machine, as a job does before it trains.

    GPUs present, free and right; versions and clocks alike; an all-reduce whose result is known; local disk, memory,
    and whether the shards can be read. Nodes that fail are named.

    Example, in a shell that `salloc --nodes 2` gave: `piip-scale preflight configs/coco/mask_rcnn_h6b_1024_512.py`
    """
    import tempfile

    from piip_scale.launch.checking import check_nodes

    configure_logging()
    # Where every node can write its answer.
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=Path.cwd()) as folder:
        spec = _by_hand(config, overrides or [], Path(folder), ranks_per_node)
        executor = _executor(spec)
        check = check_nodes(spec, executor, executor.allocated(), 0, Path(folder) / "answers", seconds)
    for node, problem in check.problems.items():
        typer.echo(f"{node}: {problem}")
    if check.shared_problem:
        typer.echo(f"every node: {check.shared_problem[1]}")
    typer.echo(f"{check.line} ({check.seconds:.1f} s)")
    raise typer.Exit(1 if check.problems or check.shared_problem else 0)


def preflight_node(
    folder: Annotated[Path, typer.Argument(help="Takes the answer.")],
    config: Annotated[Path | None, typer.Option(help="Config whose shards are looked at.")] = None,
    gpus: Annotated[int, typer.Option(min=0)] = 0,
    bound_s: Annotated[float, typer.Option(min=1)] = 180.0,
    overrides: Overrides = None,
) -> None:
    """One node's part of `preflight`."""
    from piip_scale.launch.preflight import check_node

    check_node(folder, config, overrides or [], gpus, bound_s)


def _submitted(run_dir: Path) -> JobSpec:
    from piip_scale.launch.spec import load_spec

    spec = load_spec(run_dir)
    if spec is None:
        raise ConfigError(
            f"{run_dir} holds no submitted job",
            rule="`piip-scale submit` leaves job/spec.json there",
            fix="name a config: piip-scale supervise CONFIG --run-dir RUN",
        )
    return spec


def _by_hand(
    config: Path, overrides: list[str], run_dir: Path, ranks_per_node: int | None, spares: int = 0, **more: int
) -> JobSpec:
    """The job of a batch script, or of a laptop, that did not come from `submit`."""
    from piip_scale.launch.spec import JobSpec

    job = read_allocation()
    num_nodes = (job.num_nodes if job else 1) - spares
    if num_nodes < 1:
        raise ConfigError("--spares", value=spares, rule=f"fewer than the {num_nodes + spares} nodes of the allocation")
    return JobSpec.of_command(
        config,
        run_dir,
        overrides=tuple(overrides),
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node or _usual_ranks(job),
        gpus_per_node=job.gpus_per_node if job and ranks_per_node in (None, job.gpus_per_node) else 0,
        python=sys.executable,
        rank_python=sys.executable,
        spares=spares,
        **more,
    )


def _usual_ranks(job: Allocation | None) -> int:
    return (job.gpus_per_node or job.tasks_per_node or 1) if job else 1


def _executor(spec: JobSpec) -> Executor:
    from piip_scale.launch.executors import LocalExecutor
    from piip_scale.launch.slurm_commands import Slurm
    from piip_scale.launch.slurm_executor import SlurmExecutor

    job = read_allocation()
    if job is not None:
        return SlurmExecutor(spec, job, Slurm())
    if spec.nodes_to_ask > 1:
        raise WorldError(
            f"this job is meant for {spec.nodes_to_ask} nodes, and runs outside of a Slurm allocation",
            fix="submit it, or start this command inside of sbatch or salloc",
        )
    return LocalExecutor(spec)
