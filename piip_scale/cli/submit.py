"""``piip-scale submit``: a training as a Slurm job, checked before it is sent."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from piip_scale.cli.options import ConfigPath, Overrides
from piip_scale.cli.submit_options import (
    Account,
    Constraint,
    CpusPerTask,
    Dependency,
    DryRun,
    FurtherOptions,
    GpusPerNode,
    Memory,
    NodeNames,
    Partition,
    ProfileName,
    Qos,
    Reservation,
    checked_job_name,
    site_options,
)
from piip_scale.errors import ConfigError, DataError, ModelError
from piip_scale.launch.logs import log_of
from piip_scale.launch.queue import queued_jobs
from piip_scale.launch.runs import refuse_active
from piip_scale.launch.spec import JobSpec
from piip_scale.launch.submitting import Order, Submission, plan_submission, send
from piip_scale.launch.sweeps import Point, choose_points, sweep_points
from piip_scale.run.profiled_steps import parse_profiled_steps

if TYPE_CHECKING:
    from piip_scale.config import RunConfig
    from piip_scale.data.reading.opened import OpenedSets
    from piip_scale.world import World

_GIB = 2**30
_DATA_ON_NODES = "note: shards and weights are looked at by the job's preflight, on its nodes"


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(submit)


def submit(
    config: ConfigPath,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that train.")] = 1,
    gpus_per_node: GpusPerNode = 8,
    spares: Annotated[int, typer.Option(min=0, help="Further nodes of the job, to replace lost ones at once.")] = 0,
    profile: ProfileName = "",
    partition: Partition = "",
    account: Account = "",
    qos: Qos = "",
    time: Annotated[str, typer.Option(metavar="D-HH:MM:SS", help="Time limit of one job, not of the training.")] = "",
    constraint: Constraint = "",
    exclude: NodeNames = "",
    nodelist: NodeNames = "",
    reservation: Reservation = "",
    dependency: Dependency = "",
    cpus_per_task: CpusPerTask = "",
    mem: Memory = "",
    sbatch: FurtherOptions = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY.PATH=V1,V2,...", help="A run for each value, as tasks of an array; many times."),
    ] = None,
    array: Annotated[str, typer.Option(metavar="0-3,7%N", help="Of the sweep only these runs, N at once.")] = "",
    chain: Annotated[int, typer.Option(min=0, help="Further jobs, each after the one before: no requeueing.")] = 0,
    max_stale_restarts: Annotated[
        int, typer.Option(min=0, help="Give up after so many restarts in a row without a newer checkpoint.")
    ] = 3,
    job_name: Annotated[str, typer.Option(metavar="NAME", help="Default: the run directory's name.")] = "",
    run_dir: Annotated[Path | None, typer.Option(help="Where the run lives; default: runs/NAME of the config.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the run directory.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over at step 1; a run that is there is set aside in RUN/earlier.")
    ] = False,
    dry_run: DryRun = False,
    profile_steps: Annotated[
        str, typer.Option(metavar="STEPS", help="Profile these steps of each attempt: 10, or 10-12.")
    ] = "",
    data_on_nodes: Annotated[
        bool,
        typer.Option("--data-on-nodes", help="Only the nodes see shards and weights: the job's preflight checks them."),
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow the log until the job ends; Ctrl-C leaves it.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Submit a training to Slurm as a job that looks after itself.

    It survives time limits, preemption, lost nodes and hung ranks: it saves, waits in the queue again and goes on.
    Config, code and environment are put aside in the run directory first: later edits do not change the job.

    Example: `piip-scale submit configs/coco/mask_rcnn_h6b_1024_512.py --gpus-per-node 8 --profile infiniband`
    """
    site, options = site_options(
        profile,
        sbatch,
        partition=partition,
        account=account,
        qos=qos,
        time=time,
        constraint=constraint,
        exclude=exclude,
        nodelist=nodelist,
        reservation=reservation,
        dependency=dependency,
        cpus_per_task=cpus_per_task,
        mem=mem,
    )
    points, limit = _points(sweep or [], array)
    folder = Path(os.path.abspath(run_dir or Path("runs") / config.stem))
    job = JobSpec.of_command(
        config,
        folder,
        name=checked_job_name(job_name) or folder.name,
        given_overrides=tuple(overrides or ()),
        num_nodes=nodes,
        ranks_per_node=gpus_per_node,
        spares=spares,
        chain=chain,
        max_stale_restarts=max_stale_restarts,
        profile=profile,
        profiled_steps=str(parse_profiled_steps(profile_steps) or ""),
    )
    order = Order(job, site, options, tuple(points), limit)
    submission = _submitted(order, resume=resume, restart=restart, dry_run=dry_run, data_on_nodes=data_on_nodes)
    if watch and not dry_run:
        from piip_scale.cli.jobs import watch_runs

        watch_runs([spec.run_dir for spec in submission.specs])


def _submitted(order: Order, *, resume: bool, restart: bool, dry_run: bool, data_on_nodes: bool = False) -> Submission:
    """Checks the runs, then prints the script of a dry run, or sends it."""
    submission = plan_submission(order)
    if not dry_run:
        refuse_active([spec.run_dir for spec in submission.specs], submission.files.script, queued_jobs())
    unseen = _DATA_ON_NODES if data_on_nodes else None
    checked = _check_runs(order, submission, resume=resume, restart=restart, may_miss=dry_run, unseen=unseen)
    for line in dict.fromkeys(line for run in checked for line in run.lines if line):
        typer.echo(line, err=True)
    if dry_run:
        typer.echo(submission.script, nl=False)
    else:
        if restart:
            _start_over(submission)
        _send(submission, checked)
    return submission


def _start_over(submission: Submission) -> None:
    from piip_scale.run.run_dir import RunDirectory

    # Once, here: a job that is requeued goes on with the run it began.
    for spec in submission.specs:
        RunDirectory(spec.run_dir).start_over()


def _points(sweep: list[str], array: str) -> tuple[list[Point], str]:
    if sweep:
        return choose_points(sweep_points(sweep), array)
    if array:
        raise ConfigError("--array", value=array, rule="it chooses among the runs of a --sweep", fix="add --sweep")
    return [], ""


@dataclass(frozen=True)
class _Checked:
    """A run that may start.

    Attributes:
        text: Its resolved config.
        lines: What it will need of a GPU, where that was asked, and what its ranks change.
    """

    text: str
    lines: tuple[str, ...] = ()


def _check_runs(
    order: Order, submission: Submission, *, resume: bool, restart: bool, may_miss: bool, unseen: str | None
) -> list[_Checked]:
    """What every rank would report at its start, reported now, for each run.

    Args:
        order: What was asked for.
        submission: What it comes to.
        resume: The runs go on.
        restart: The runs are set aside.
        may_miss: Shards or weights that this machine does not see are a note, not an error.
        unseen: The note where neither is to be looked at; ``None`` where they are.

    Raises:
        PiipError: As ``check_start``.
    """
    from piip_scale.cli.train import check_start
    from piip_scale.config import load_config
    from piip_scale.config.loading import config_text
    from piip_scale.data.reading.opened import OpenedSets
    from piip_scale.engine.batching import shrunk_line
    from piip_scale.world import World

    world = World(num_ranks=order.job.num_ranks, ranks_per_node=order.job.ranks_per_node)
    checked, sets = [], OpenedSets()
    for spec in submission.specs:
        config = load_config(order.job.source_config, spec.given_overrides)
        resolved, note = (config, unseen) if unseen else _seen_here(config, sets, may_miss=may_miss)
        if note:
            _check_without_data(resolved, spec.run_dir, world, resume=resume and not restart, restart=restart)
        else:
            check_start(resolved, spec.run_dir, world, sets, resume=resume and not restart, restart=restart)
        line = _memory_line(resolved, order) if order.profile.gpu_memory_gib and not note else note
        checked.append(_Checked(config_text(resolved), (shrunk_line(resolved, order.job.num_ranks), line)))
    return checked


def _seen_here(config: RunConfig, sets: OpenedSets, *, may_miss: bool) -> tuple[RunConfig, str]:
    """The config with its classes, and a note where shards or weights are not to be seen from here."""
    from piip_scale.models.pretrained import check_pretrained
    from piip_scale.tasks.classes import with_classes

    try:
        resolved = with_classes(config, sets)
        check_pretrained(resolved.model)
    except (DataError, ModelError) as error:
        if not may_miss:
            raise
        return config, f"note: not checked: {error.line}"
    return resolved, ""


def _check_without_data(config: RunConfig, run_dir: Path, world: World, *, resume: bool, restart: bool) -> None:
    """What can be checked of a start by a machine that sees neither shards nor weights."""
    import torch

    from piip_scale.engine.batching import scale_to_ranks
    from piip_scale.engine.zero.plan import measure, plan_sharding
    from piip_scale.run.run_dir import RunDirectory
    from piip_scale.tasks.base import TrainableModel
    from piip_scale.tasks.kinds import build_model

    RunDirectory(run_dir).check(resume=resume, restart=restart)
    scaled = scale_to_ranks(config, world.num_ranks)
    with torch.device("meta"):
        # How many classes there are changes no rule of sharding.
        model = build_model(scaled, len(scaled.data.classes) or 1)
    sizes = measure(model, cast(TrainableModel, model).parts())
    plan_sharding(scaled, sizes, world.num_ranks, world.ranks_per_node)


def _memory_line(config: RunConfig, order: Order) -> str:
    """What `plan` reports, in short; an estimate, so a warning and no refusal."""
    from functools import partial

    from piip_scale.engine.planning.planner import Planner
    from piip_scale.tasks.outline import outline_run

    assert order.profile.gpu_memory_gib is not None
    outline_of = partial(outline_run, num_classes=len(config.data.classes))
    planner = Planner(outline_of, order.profile.gpu_memory_gib * _GIB, order.job.ranks_per_node)
    plan = planner.plan(config, order.job.num_ranks)
    planned = f"planned memory: {plan.total / _GIB:.1f} of {order.profile.gpu_memory_gib:g} GiB a GPU"
    return planned if plan.fits else f"warning: {planned}; piip-scale plan lists what helps"


def _send(submission: Submission, checked: Sequence[_Checked]) -> None:
    job_ids, notes = send(submission, [run.text for run in checked])
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    first = submission.specs[0]
    what = f" ({len(submission.specs)} runs)" if first.array_task is not None else ""
    chained = f", then {', '.join(map(str, job_ids[1:]))}" if len(job_ids) > 1 else ""
    typer.echo(f"submitted job {job_ids[0]}{what}{chained}")
    typer.echo(f"script:      {shlex.quote(str(submission.files.script))}")
    typer.echo(f"log:         {shlex.quote(str(log_of(first, job_ids[0])))}")
    typer.echo(f"watch:       piip-scale jobs logs -f {shlex.quote(str(first.run_dir))}")
    board = submission.folder if what else submission.folder / "tensorboard"
    typer.echo(f"tensorboard: tensorboard --logdir {shlex.quote(str(board))}")
