"""The ``piip-scale`` command: parses, and calls the package."""

from __future__ import annotations

import typer

from piip_scale import __version__
from piip_scale.cli import (
    convert,
    count,
    demo,
    evaluate,
    export,
    jobs,
    plan,
    predict,
    replay,
    report,
    serve,
    shards,
    submit,
    submit_evaluation,
    supervise,
    train,
    weights,
)
from piip_scale.errors import WorldError
from piip_scale.world import read_world

app = typer.Typer(
    name="piip-scale",
    cls=submit_evaluation.TwoWordGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    help=(
        "Train, convert, evaluate and use Parameter-Inverted Image Pyramid detectors.\n\n"
        "The way from a COCO file to a picture:\n\n"
        "1. `piip-scale shards pack coco ann.json --images DIR --out shards/train`\n\n"
        "2. `piip-scale train CONFIG --run-dir runs/mine --set data.train_shards=shards/train`\n\n"
        "3. `piip-scale convert runs/mine/checkpoints mine.safetensors`\n\n"
        "4. `piip-scale evaluate runs/mine`\n\n"
        "5. `piip-scale predict runs/mine photo.jpg --out photo.png`\n\n"
        "Configs are Python files; `--set key.path=value` changes any key of one."
    ),
)
app.add_typer(shards.app, name="shards")
app.add_typer(weights.app, name="weights")
app.add_typer(jobs.app, name="jobs")
train.register(app)
submit.register(app)
submit_evaluation.register(app)
convert.register(app)
evaluate.register(app)
predict.register(app)
export.register(app)
serve.register(app)
count.register(app)
plan.register(app)
report.register(app)
replay.register(app)
demo.register(app)
supervise.register(app)


# What ranks may do together, or what looks after them; everything else is one process's work.
_FOR_RANKS = (
    *("train", "supervise", "preflight", "preflight-node", "evaluate", "evaluate-ranks"),
    *("submit", submit_evaluation.NAME, "jobs"),
)


@app.callback(invoke_without_command=True)
def _before(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand not in _FOR_RANKS:
        _leave_to_rank_0(context.invoked_subcommand or "")


def _leave_to_rank_0(command: str) -> None:
    """Under torchrun or srun, N processes would do the same N times and write over each other."""
    try:
        world = read_world()
    except WorldError:
        # Half a world, as some containers set: whoever asks for one process is alone.
        return
    if not world.is_main:
        raise typer.Exit
    if world.num_ranks > 1:
        typer.echo(f"piip-scale: {command} is done by one process: rank 0 of {world.num_ranks}", err=True)
