"""``piip-scale train``: one run, on one machine or as one rank of a job."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from piip_scale.cli.endings import ended_at_once
from piip_scale.cli.options import ConfigPath, Overrides
from piip_scale.config import RunConfig, load_config
from piip_scale.config.loading import changed_keys, config_text
from piip_scale.errors import PiipError
from piip_scale.launch.compile_caches import use_local_cache
from piip_scale.logging import configure_logging
from piip_scale.run.profiled_steps import ProfiledSteps, parse_profiled_steps
from piip_scale.world import World, claimed_rank, read_world

if TYPE_CHECKING:
    from piip_scale.data.reading.opened import OpenedSets


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(train)


def train(
    config: ConfigPath,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run lives; default: runs/NAME of the config.")] = None,
    procs: Annotated[
        int | None,
        typer.Option("--procs", "--gpus", min=1, help="Processes on this machine; default: one per GPU, or one."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the run directory.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over at step 1; a run that is there is set aside in RUN/earlier.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Draw a progress line.")] = True,
    profile: Annotated[
        str,
        typer.Option(
            "--profile", "--profile-steps", metavar="STEPS", help="Profile these steps of this attempt: 10, or 10-12."
        ),
    ] = "",
    overrides: Overrides = None,
) -> None:
    """Train a model; the run directory keeps config, metrics and checkpoints.

    Starts its processes itself, or is one rank where torchrun or srun started it. Ctrl-C saves and stops; `--resume`
    goes on from the newest checkpoint as if nothing had happened.

    Example: `piip-scale train configs/demo/digits.py --procs 2 --run-dir runs/mine --set train.steps=200`
    """
    folder = run_dir or Path("runs") / config.stem
    try:
        use_local_cache()
        # Until it takes signals over itself there is nothing to save.
        with ended_at_once():
            code = run_training(
                config,
                overrides or [],
                folder,
                procs=procs,
                resume=resume,
                restart=restart,
                progress=progress,
                profile=profile,
            )
    except PiipError as error:
        rank = claimed_rank()
        if rank is None:
            raise
        code = _report_as_rank(error, folder, rank)
    # At once: after an error, threads of the communication library may never end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_training(
    config: Path,
    overrides: Sequence[str],
    run_dir: Path,
    *,
    procs: int | None,
    resume: bool,
    restart: bool = False,
    progress: bool = True,
    profile: str = "",
    sets: OpenedSets | None = None,
) -> int:
    """Trains in processes of its own, or as the rank this process already is; returns the exit code.

    Args:
        config: A config file.
        overrides: Changes to it, as ``load_config`` takes them.
        run_dir: The run's directory.
        procs: Processes to start; one per GPU, or one, where ``None``.
        resume: Continue the run in it.
        restart: Set aside the run in it and start over; goes before ``resume``.
        progress: Draw a progress line.
        profile: Steps of this attempt that rank 0 profiles, as ``10`` or ``10-12``; empty for none.
        sets: Those that this process has open; ``None`` for none.

    Raises:
        PiipError: Config, shards, directory or world do not allow a start, or a rank ended without a report.
    """
    from piip_scale.data.reading.opened import OpenedSets
    from piip_scale.tasks.classes import with_classes
    from piip_scale.telemetry.trackers import require_trackers

    profiled = parse_profiled_steps(profile)
    resolved = load_config(config, overrides)
    require_trackers(resolved.telemetry.trackers)
    sets = sets or OpenedSets()
    resolved = with_classes(resolved, sets)
    resume = resume and not restart
    if resume and resolved.zero.open_keys:
        resolved = with_layout_of(resolved, run_dir / "config.py")
    if restart and read_world().is_main:
        _refuse_active(run_dir)
    num_procs = procs or _num_gpus() or 1
    if num_procs == 1 or read_world().launcher != "single":
        settings = _settings(run_dir, overrides)
        return _train_here(
            resolved, run_dir, settings, sets, resume=resume, restart=restart, progress=progress, profiled=profiled
        )
    world = World(num_ranks=num_procs, ranks_per_node=num_procs)
    check_start(resolved, run_dir, world, sets, resume=resume, restart=restart)
    from piip_scale.engine.local_launch import launch_local
    from piip_scale.run.run_dir import RunDirectory

    command = [sys.executable, "-m", "piip_scale.cli.main", "train", str(config), "--run-dir", str(run_dir)]
    command += ["--resume"] * resume + ["--restart"] * restart + ["--no-progress"] * (not progress)
    command += [f"--profile={profiled}"] if profiled else []
    command += [f"--set={override}" for override in overrides]
    return launch_local(num_procs, command, RunDirectory(run_dir))


def _refuse_active(run_dir: Path) -> None:
    from piip_scale.launch.runs import refuse_active

    # No queue is asked: the job that runs this command may itself be the run's.
    refuse_active([run_dir], run_dir, [])


def with_layout_of(config: RunConfig, earlier: Path) -> RunConfig:
    """The config with what it leaves open as the run to resume decided it, where that came so far."""
    if not earlier.is_file():
        return config
    zero = load_config(earlier).zero
    return config if zero.open_keys else config.model_copy(update={"zero": config.zero.decided(zero)})


def check_start(
    config: RunConfig, run_dir: Path, world: World, sets: OpenedSets, *, resume: bool, restart: bool = False
) -> None:
    """Reports once, before any process starts, what every rank would.

    Args:
        config: The run, with its classes.
        run_dir: Its directory.
        world: The ranks that will train.
        sets: Its sets, open.
        resume: They will continue the run there.
        restart: They will set aside a run there.

    Raises:
        PiipError: Directory, shards, model or sharding do not allow a start on these ranks.
    """
    import torch

    from piip_scale.engine.batching import scale_to_ranks
    from piip_scale.engine.resuming import newest_checkpoint, refuse_lost_checkpoints
    from piip_scale.engine.start_weights import check_start_weights
    from piip_scale.engine.zero.checks import checked_plan
    from piip_scale.models.pretrained import check_pretrained
    from piip_scale.run.run_dir import RunDirectory
    from piip_scale.tasks.kinds import build_model, build_task

    run = RunDirectory(run_dir)
    run.check(resume=resume, restart=restart)
    newest = None if restart else newest_checkpoint(run.checkpoints)
    if resume and not newest:
        refuse_lost_checkpoints(run)
    if newest:
        config = newest.kept(config, world.num_ranks)
    scaled = scale_to_ranks(config, world.num_ranks)
    build_task(scaled, world, sets=sets).check()
    with torch.device("meta"):
        model = build_model(scaled, len(scaled.data.classes))
    if newest is None:
        check_pretrained(scaled.model)
        check_start_weights(model, scaled)
    checked_plan(model, scaled, world)


def _report_as_rank(error: PiipError, run_dir: Path, rank: int) -> int:
    """One of many ranks could not start: mostly none could, and one of them reports it."""
    from piip_scale.run.failing import report_failure
    from piip_scale.run.run_dir import RunDirectory

    configure_logging(rank)
    return report_failure(RunDirectory(run_dir), rank, error)


def _train_here(
    config: RunConfig,
    run_dir: Path,
    settings: Mapping[str, Any],
    sets: OpenedSets,
    *,
    resume: bool,
    restart: bool,
    progress: bool,
    profiled: ProfiledSteps | None,
) -> int:
    from piip_scale.engine.worker import train_worker
    from piip_scale.run.run_dir import RunDirectory
    from piip_scale.tasks.kinds import build_task

    run = RunDirectory(run_dir)
    build = partial(build_task, broken_samples=run.broken_samples, sets=sets)
    return train_worker(
        config,
        config_text(config),
        run,
        build,
        resume=resume,
        restart=restart,
        show_progress=progress,
        profiled=profiled,
        settings=settings,
    )


def _settings(run_dir: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What was changed from the recipe, here or where the run was submitted, which has it in the job's own config."""
    from piip_scale.launch.spec import load_spec

    spec = load_spec(run_dir)
    return changed_keys([*(spec.given_overrides if spec else ()), *overrides])


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
