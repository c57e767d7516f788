"""``piip-scale submit evaluate``: an evaluation as a Slurm job, checked before it is sent."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from piip_scale.cli.evaluate import check_evaluation, evaluate
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
from piip_scale.errors import ConfigError
from piip_scale.launch.queue import queued_jobs

if TYPE_CHECKING:
    from piip_scale.launch.evaluating import Evaluation
    from piip_scale.launch.profiles import Profile
    from piip_scale.launch.spec import JobSpec

NAME = "submit evaluate"
_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True}
_METAVAR = "CONFIG|RUN [WEIGHTS] [OPTIONS, EVALUATE'S TOO]"


class TwoWordGroup(TyperGroup):
    """Commands of which some have two words: ``submit evaluate`` beside ``submit CONFIG``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As its base, which knows of one word only."""
        if " ".join(args[:2]) in self.commands:
            args = [" ".join(args[:2]), *args[2:]]
        return super().resolve_command(ctx, args)


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command(NAME, options_metavar=_METAVAR, context_settings=_PASSED_ON)(submit_evaluation)
    app.command("evaluate-ranks", hidden=True, context_settings=_PASSED_ON)(evaluate_ranks)


def submit_evaluation(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Gets metrics, predictions, charts, and in job/ script and log.")
    ],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that share the images.")] = 1,
    gpus_per_node: GpusPerNode = 8,
    profile: ProfileName = "",
    partition: Partition = "",
    account: Account = "",
    qos: Qos = "",
    time: Annotated[str, typer.Option(metavar="D-HH:MM:SS", help="Time limit.")] = "",
    constraint: Constraint = "",
    exclude: NodeNames = "",
    nodelist: NodeNames = "",
    reservation: Reservation = "",
    dependency: Dependency = "",
    cpus_per_task: CpusPerTask = "",
    mem: Memory = "",
    sbatch: FurtherOptions = None,
    job_name: Annotated[str, typer.Option(metavar="NAME", help="Default: the model's name, and -evaluate.")] = "",
    dry_run: DryRun = False,
    data_on_nodes: Annotated[
        bool, typer.Option("--data-on-nodes", help="Only the nodes see model and set: neither is looked at here.")
    ] = False,
) -> None:
    """Submit an evaluation to Slurm: a process a GPU, each image once.

    Model, set and every other option are those of `piip-scale evaluate`, and are checked before anything is sent. Of a
    run's directory the newest checkpoint is taken when the job starts.

    Example: `piip-scale submit evaluate runs/mine --out scores/ --gpus-per-node 8 --profile infiniband`
    """
    words = list(context.args)
    asked = _asked(words)
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
    job = _job(asked["config"], out, job_name, profile=profile, num_nodes=nodes, ranks_per_node=gpus_per_node)
    words.remove(_word_of(asked["config"], words))
    evaluation, config = _planned(job, site, options, words)
    if not data_on_nodes:
        check_evaluation(asked)
    if dry_run:
        typer.echo(evaluation.script, nl=False)
        return
    _send(evaluation, config)


def evaluate_ranks(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The folder of the results, with the job's files.")],
) -> None:
    """What the batch job of an evaluation runs: its ranks, as one step of this allocation."""
    from piip_scale.launch.evaluating import run_ranks
    from piip_scale.launch.slurm_commands import Slurm
    from piip_scale.launch.slurm_executor import SlurmExecutor
    from piip_scale.launch.spec import load_evaluation
    from piip_scale.world import read_allocation

    spec, allocation = load_evaluation(folder), read_allocation()
    if spec is None or allocation is None:
        raise ConfigError(
            "evaluate-ranks", value=str(folder), rule="it is run by the job of a submitted evaluation alone",
            fix="piip-scale submit evaluate",
        )  # fmt: skip
    raise typer.Exit(run_ranks(spec, SlurmExecutor(spec, allocation, Slurm()), context.args))


def _asked(words: Sequence[str]) -> dict[str, Any]:
    """What ``evaluate`` is asked, by its parameters; ends as it does where it cannot be meant."""
    app = typer.Typer(add_completion=False)
    app.command()(evaluate)
    values: dict[str, Any] = typer.main.get_command(app).make_context(NAME, list(words)).params
    if values["config"] is None or values["results"] is not None:
        raise ConfigError(
            NAME,
            rule="it evaluates a model: a config and weights, or a run's directory",
            fix="piip-scale evaluate --results FILE needs no job" if values["results"] else "name one",
        )
    if values["procs"] is not None:
        raise ConfigError("--procs", value=values["procs"], rule="processes of a job follow from --gpus-per-node")
    if values["spread"] or values["devices"] is not None:
        raise ConfigError("--spread", rule="a job evaluates with a process a GPU, and a whole model in each")
    return values


def _word_of(config: Path, words: Sequence[str]) -> str:
    return next(word for word in words if Path(word) == config)


def _job(source: Path, out: Path, name: str, **facts: Any) -> JobSpec:
    from piip_scale.launch.spec import JobSpec

    if out.suffix == ".json":
        raise ConfigError("--out", value=str(out), rule="a job writes a folder", fix="leave .json out")
    of_model = source.stem if source.is_file() else source.resolve().name
    folder = Path(os.path.abspath(out))
    return JobSpec.of_command(source, folder, name=checked_job_name(name) or f"{of_model}-evaluate", **facts)


def _planned(job: JobSpec, site: Profile, options: Any, words: Sequence[str]) -> tuple[Evaluation, str | None]:
    """The job, and the text of its config where that is a file, which is put aside."""
    from piip_scale.config.loading import config_text, load_config
    from piip_scale.launch.evaluating import plan_evaluation
    from piip_scale.launch.freeze import Frozen
    from piip_scale.launch.spec import JobFiles

    text = config_text(load_config(job.source_config)) if job.source_config.is_file() else None
    if text is not None:
        job = job.with_facts(config=Frozen(JobFiles(job.run_dir).frozen).config)
    return plan_evaluation(job, site, options, words), text


def _send(evaluation: Evaluation, config: str | None) -> None:
    from piip_scale.launch.evaluating import refuse_double, send_evaluation
    from piip_scale.launch.logs import log_of

    refuse_double(evaluation, queued_jobs())
    job_id, notes = send_evaluation(evaluation, config)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    log, out = log_of(evaluation.spec, job_id), evaluation.spec.run_dir
    typer.echo(f"submitted job {job_id}")
    typer.echo(f"script:  {shlex.quote(str(evaluation.files.evaluation_script))}")
    typer.echo(f"log:     {shlex.quote(str(log))}")
    typer.echo(f"results: {shlex.quote(str(out))}")
