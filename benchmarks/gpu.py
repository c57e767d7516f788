#!/usr/bin/env python
"""Measures one GPU from ceilings to a training, row by row; ``--rehearse`` runs the same at toy sizes on a CPU.

Each section has a deadline and a process of its own; each row is printed and written the moment it is known, so that a
run that is cut off still tells what it saw. Called again with the same folder it goes on where it was.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from sections.gpu import SECTIONS
from sections.gpu.jobs import Job, Setting, print_rows

_NAMES = f"Of {', '.join(SECTIONS)}; all, in this order, where none is named."


def main(
    names: Annotated[list[str] | None, typer.Argument(help=_NAMES)] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="For everything; 4 give the first three and a row.")] = 15,
    out: Annotated[
        Path, typer.Option(help="Folder of gpu.jsonl and gpu.md; rows in it are not measured again.")
    ] = Path("runs/gpu"),
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Toy sizes, on a CPU.")] = False,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
    seconds: Annotated[float, typer.Option(hidden=True)] = 0,
    done: Annotated[str, typer.Option(hidden=True)] = "[]",
) -> None:
    """Measure, print and record."""
    unknown = sorted({*(names or ()), *([child] if child else [])} - SECTIONS.keys())
    if unknown:
        raise typer.BadParameter(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if not rehearse and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here; --rehearse runs everything at toy sizes on a CPU")
    if child:
        print_rows(section_jobs(child, rehearse=rehearse), json.loads(done), seconds)
        return
    from sections.gpu.running import Record, run_sections

    run_sections(Record(out, rehearse=rehearse), names or list(SECTIONS), minutes * 60, typer.echo)
    typer.echo(f"{out / 'gpu.md'}")


def section_jobs(name: str, *, rehearse: bool) -> list[Job]:
    """The jobs of a section on this machine."""
    if rehearse:
        torch.set_num_threads(1)  # threads of toy sizes only wait for each other
    setting = Setting(torch.device("cpu" if rehearse else "cuda"), rehearse)
    found: list[Job] = importlib.import_module(SECTIONS[name].module).jobs(setting)
    return found


if __name__ == "__main__":
    typer.run(main)
