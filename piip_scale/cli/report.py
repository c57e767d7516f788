"""``piip-scale report``: how runs go, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from piip_scale.errors import RunError
from piip_scale.files import disk_errors
from piip_scale.pages.html import GENERATOR
from piip_scale.text import printable

_OUT = Path("report.html")
_MOST_RUNS = 40
_HEAD_BYTES = 1 << 10


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(report)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Directories of runs, or folders of them.", readable=False),
    ],
    out: Annotated[Path, typer.Option(help="The file.")] = _OUT,
) -> None:
    """Write how runs go into one HTML file, which opens without a server or network, on a phone too.

    State and time to go, curves with restarts, what limits a step, the last evaluation, where configs differ. Works on
    runs that failed, and while they run.
    """
    from piip_scale.cli.jobs import listing
    from piip_scale.data.reading.files import write_bytes
    from piip_scale.launch.report import read_reported, report_page
    from piip_scale.launch.runs import find_runs

    for path in runs:
        if not find_runs([path]):
            fix = "piip-scale jobs lists those there are"
            raise RunError("no run's directory, and none in it", value=str(path), fix=fix)
    rows, warning = listing(runs)
    if len(rows) > _MOST_RUNS:
        raise RunError("too many runs for a page", value=len(rows), rule=f"at most {_MOST_RUNS}", fix="name fewer")
    _refuse_foreign(out)
    content = report_page([read_reported(row) for row in rows])
    write_bytes(out, content)
    typer.echo(printable(f"written: {out} ({len(content) / 1e3:.0f} kB, {len(rows)} run(s))"))
    if warning:
        typer.echo(warning, err=True)


def _refuse_foreign(path: Path) -> None:
    """A page is written over an older one, and over nothing else."""
    if path.is_dir():
        raise RunError("--out", value=str(path), rule="a file, and this is a folder", fix=f"--out {path / _OUT}")
    with disk_errors(RunError, f"read {path}"):
        is_foreign = path.exists() and GENERATOR.encode() not in path.read_bytes()[:_HEAD_BYTES]
    if is_foreign:
        raise RunError("--out", value=str(path), rule="no report is there, but another file", fix="name another place")
