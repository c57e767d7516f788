#!/usr/bin/env python
"""Measures what a step costs the host and writes Markdown; ``--record`` puts the sections into step.md."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer
from sections import host_time
from sections.record import measure

RECORD = Path(__file__).with_suffix(".md")


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Of the sections; all where none is named.")] = None,
    against: Annotated[Path | None, typer.Option(help="Another version's folder, measured in turn.")] = None,
    record: Annotated[bool, typer.Option(help="Replace the sections in step.md beside this script.")] = False,
) -> None:
    """Measure and print."""
    sections = {"Host time": functools.partial(host_time.section, against and against.resolve())}
    measure(sections, names, Path(__file__), RECORD if record else None)


if __name__ == "__main__":
    typer.run(main)
