"""``piip-scale jobs``: how every run goes, and asking one to stop or to go back into the queue."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from piip_scale.errors import RunError, SlurmError
from piip_scale.launch.control import requeue_run, stop_run
from piip_scale.launch.logs import find_logs, follow, sizes, tail
from piip_scale.launch.queue import QueuedJob, ended_states, has_slurm, queued_jobs
from piip_scale.launch.runs import Row, Run, describe, find_runs, read_run, with_ends
from piip_scale.launch.words import duration

app = typer.Typer(
    help=(
        "List runs, read a run's log, stop it, send it through the queue again.\n\n"
        "SEEN is how long ago the last sign came that a state rests on: a step, a heartbeat, a submission, an end.\n\n"
        "Of the states, `stalled` runs and stands still; `stopping` was asked to save and end; `waiting` is between "
        "two attempts; `held` waits for a release, which `requeue` gives; `given-up` waits for a person to look; "
        "`lost` ended without a report, as do `timeout`, `out-of-memory`, `node-lost` and `preempted`, which Slurm "
        "names; all go on with `requeue`."
    )
)
_HEADS = ("RUN", "STATE", "SEEN", "JOB", "STEP", "IMAGES/S", "ETA", "RESTARTS", "LAST EVENT")
# What a narrow terminal does without, the first first, for so much of the last event.
_SPARED = ("JOB", "RESTARTS", "IMAGES/S", "SEEN")
_EVENT_LETTERS = 12
# Of a run's path, before columns are left out and after all are.
_LONG_RUN_LETTERS, _RUN_LETTERS = 40, 12
_GAP = "  "
_EVERY_S = 5.0

Listing = tuple[list[Row], str]

# Whether it can be read is said in one line, as of all other runs.
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.", readable=False)]


@app.callback(invoke_without_command=True)
def jobs(
    context: typer.Context,
    runs: Annotated[
        list[Path] | None, typer.Option("--runs", metavar="DIR", help="Folders of runs; default: runs/; many times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Stay, and show how they go on; Ctrl-C leaves.")] = False,
    every_s: Annotated[
        float, typer.Option("--every", metavar="SECONDS", min=1, help="How often --watch looks.")
    ] = _EVERY_S,
) -> None:
    """List runs with state, step, images/s, time to go, restarts and last event, from the queue and their files.

    Works without Slurm too, for runs that `piip-scale train` started. The time to go leaves out saves and evaluations.
    """
    if context.invoked_subcommand is not None:
        return
    folders = runs or [Path("runs")]
    for folder in folders if runs else ():
        if not folder.is_dir():
            raise RunError("--runs", value=str(folder), rule="a folder that is there")
    if watch and as_json:
        raise RunError("--watch and --json", rule="a program asks again by itself", fix="leave out --watch")
    is_live = watch and sys.stdout.isatty()
    if is_live:
        from piip_scale.cli.watch import Ends, watch_table

        watch_table(partial(listing, folders, Ends()), every_s)
        return
    rows, warning = listing(folders)
    _print(rows, folders, as_json=as_json)
    for line in (warning, "--watch needs a terminal; this is how they are now" if watch else ""):
        if line:
            typer.echo(line, err=True)


def listing(folders: Sequence[Path], ask: Callable[[Sequence[int]], Mapping[int, str]] = ended_states) -> Listing:
    """All runs in folders as they are now, and a warning where the queue could not be asked.

    Args:
        folders: Searched for runs.
        ask: As ``ended_states``.
    """
    queue, warning = known_queue()
    found = [read_run(path, queue) for path in find_runs(folders)]
    return [describe(run) for run in (found if queue is None or not has_slurm() else with_ends(found, ask))], warning


def _print(rows: Sequence[Row], folders: Sequence[Path], *, as_json: bool) -> None:
    if as_json:
        for row in rows:
            typer.echo(json.dumps(asdict(row) | {"run": str(row.run)}))
    elif rows:
        typer.echo("\n".join(table(rows, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)))
    else:
        typer.echo(f"no runs in {', '.join(map(str, folders))}; --runs DIR looks elsewhere", err=True)


@app.command()
def logs(
    run: RunPath,
    lines: Annotated[int, typer.Option("-n", min=0, help="Begin with so many of the last lines.")] = 50,
    keep_on: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the job ends; Ctrl-C leaves it.")
    ] = False,
) -> None:
    """Print the end of a job's log, the newest where it had several."""
    found = _read(run, known_queue()[0])
    if found.spec is None:
        raise RunError(f"{run} has no job, and so no log", fix=f"metrics.jsonl and errors/ in {run} show how it went")
    if not found.spec.log:
        raise RunError(
            f"the job of {run} was submitted by hand", fix="its log is where the batch script's output option says"
        )
    there = find_logs(found.spec)
    # What comes between this and the following must not be lost.
    shown = sizes(there)
    if there:
        text = tail(there[-1], lines, shown.get(there[-1]))
        typer.echo(text, nl=bool(text) and not keep_on and not text.endswith("\n"))
    elif not keep_on:
        raise RunError(f"{run} has no log yet", value=describe(found).state, fix="add -f to wait for it")
    if keep_on:
        watch_runs([run], shown)


@app.command()
def stop(run: RunPath) -> None:
    """Have a run save and end, for good: it is not requeued, and what waits for it leaves the queue."""
    queue = _queue_for(run)
    typer.echo(stop_run(_read(run, queue), queue))


@app.command()
def requeue(run: RunPath) -> None:
    """Send a run through the queue again: saving first where it runs, anew where it has ended."""
    typer.echo(requeue_run(_read(run, _queue_for(run))))


def watch_runs(paths: Sequence[Path], shown: Mapping[Path, int] | None = None) -> None:
    """Prints the logs of jobs as they grow until none of them waits or runs, then how each run ended.

    Args:
        paths: Directories of the runs.
        shown: How many bytes of each log have been printed already.

    Raises:
        RunError: A run ended otherwise than done.
    """
    specs = [spec for path in paths if (spec := _read(path, []).spec) is not None]
    try:
        pieces = follow(lambda: [log for spec in specs for log in find_logs(spec)], _all_over(paths), shown=shown)
        for piece in pieces:
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        typer.echo(f"\nleft; the job goes on: piip-scale jobs logs -f {paths[0]}", err=True)
        return
    ended = [describe(_read(path, [])) for path in paths]
    for row in ended:
        typer.echo(f"{row.run}: {row.state} at step {row.step}{f' ({row.event})' if row.event else ''}", err=True)
    bad = [row for row in ended if row.state != "done"]
    if bad:
        raise RunError(f"{len(bad)} of {len(ended)} runs did not end as done", value=str(bad[0].run))


def table(rows: Sequence[Row], width: int | None) -> list[str]:
    """The rows as lines of a table, cut to a terminal's width where there is one.

    A narrow one has fewer columns, and then the ends of the runs' paths alone, so that the state, the time to go and
    the last event have room.
    """
    cells = list(map(_cells, rows))
    columns = {head: [line[place] for line in cells] for place, head in enumerate(_HEADS)}
    widths = {head: max(map(len, (head, *texts))) for head, texts in columns.items()} | {_HEADS[-1]: _EVENT_LETTERS}
    kept = list(_HEADS)
    if width is not None:
        _fit(widths, kept, width)
        columns["RUN"] = [_end_of(text, widths["RUN"]) for text in columns["RUN"]]
    lines = [kept, *zip(*(columns[head] for head in kept), strict=True)]
    cut = [
        _GAP.join(cell.ljust(widths[head]) for cell, head in zip(line, kept, strict=True)).rstrip() for line in lines
    ]
    return [line if width is None else line[:width] for line in cut]


def _fit(widths: dict[str, int], kept: list[str], width: int) -> None:
    """Takes columns from ``kept``, and letters from the runs' paths before and after, until all have room."""
    for letters in (_LONG_RUN_LETTERS, _RUN_LETTERS):
        excess = max(_needed(widths, kept) - width, 0)
        widths["RUN"] = max(widths["RUN"] - excess, min(letters, widths["RUN"]))
        for head in _SPARED:
            if head in kept and _needed(widths, kept) > width:
                kept.remove(head)


def _needed(widths: Mapping[str, int], kept: Sequence[str]) -> int:
    return sum(widths[name] + len(_GAP) for name in kept) - len(_GAP)


def _end_of(text: str, letters: int) -> str:
    """The end of a path tells runs apart, its begin is what they share."""
    return text if len(text) <= letters else f"..{text[len(text) - letters + 2 :]}"


def _cells(row: Row) -> tuple[str, ...]:
    total = "" if row.total_steps is None else f"/{row.total_steps}"
    rate = "-" if row.images_per_second is None else f"{row.images_per_second:.1f}"
    eta = "-" if row.eta_s is None else duration(row.eta_s)
    seen = "-" if row.seen_s is None else duration(row.seen_s)
    cells = (str(row.run), row.state, seen, row.job, f"{row.step}{total}", rate, eta, str(row.restarts), row.news)
    return tuple(map(printable, cells))


def printable(text: str) -> str:
    """A text from outside as a terminal may see it: line breaks, escapes and broken letters are spelled out."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _read(path: Path, queue: Sequence[QueuedJob] | None) -> Run:
    if path.resolve() not in find_runs([path.resolve()]):
        inside = find_runs([path]) if path.is_dir() else []
        fix = f"name one of its runs, {inside[0]} for instance" if inside else "piip-scale jobs lists those there are"
        raise RunError("no run's directory", value=str(path), fix=fix)
    found = read_run(path.resolve(), queue)
    if found.spec is None and found.problem:
        raise RunError(found.problem)
    return found


def known_queue() -> tuple[list[QueuedJob] | None, str]:
    """The queue, and a warning instead where a controller that should be there does not answer."""
    if not has_slurm():
        return [], ""
    try:
        return queued_jobs(), ""
    except SlurmError as error:
        return None, f"without the queue: {error.line}"


def _queue_for(run: Path) -> list[QueuedJob]:
    """The queue, without which a run that has a job must not be touched; others need none."""
    found = _read(run, [])
    return queued_jobs() if found.spec is not None or found.attempts else []


def _all_over(paths: Sequence[Path]) -> Callable[[], bool]:
    def over() -> bool:
        try:
            queue = queued_jobs()
        except SlurmError:
            return False
        return all(_read(path, queue).job is None for path in paths)

    return over
