"""The ``piip-scale`` command: parses, calls the package, and turns errors into one line."""

from __future__ import annotations

import errno
import io
import os
import sys
from io import TextIOWrapper

import typer

from piip_scale import __version__
from piip_scale.cli import count, demo, detect, jobs, plan, shards, submit, supervise, train, weights
from piip_scale.errors import PiipError, WorldError
from piip_scale.world import read_world

app = typer.Typer(
    name="piip-scale",
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
        "4. `piip-scale evaluate CONFIG mine.safetensors`\n\n"
        "5. `piip-scale predict CONFIG mine.safetensors photo.jpg --out photo.png`\n\n"
        "Configs are Python files; `--set key.path=value` changes any key of one."
    ),
)
app.add_typer(shards.app, name="shards")
app.add_typer(weights.app, name="weights")
app.add_typer(jobs.app, name="jobs")
train.register(app)
submit.register(app)
detect.register(app)
count.register(app)
plan.register(app)
demo.register(app)
supervise.register(app)

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


# What ranks may do together, or what looks after them; everything else is one process's work.
_FOR_RANKS = ("train", "supervise", "preflight", "preflight-node", "submit", "jobs")


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


def main() -> None:
    """Entry point: exit code 0, or one line on standard error and the error's own code."""
    for stream in (sys.stdout, sys.stderr):
        # Paths may hold bytes that are no text, names letters that a terminal's encoding lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdout, TextIOWrapper):
        # Names of files need not be UTF-8, as they may come from anywhere.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except PiipError as error:
        _fail(error.line, error.exit_code)
    except SystemExit as end:
        # typer ends a command that Ctrl-C interrupts without a word; a training has told its own.
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            print("piip-scale: stopped by Ctrl-C before it was done", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f": {error.filename}" if error.filename else ""
        _fail(f"{os.strerror(error.errno or 0)}{where}; free space or choose a writable place, then run again", 1)


def _fail(line: str, exit_code: int) -> None:
    print(f"piip-scale: error: {line}", file=sys.stderr)
    raise SystemExit(exit_code)


if __name__ == "__main__":
    main()
