#!/usr/bin/env python
"""Measures what telemetry costs a step and writes Markdown; ``--record`` puts the section into telemetry.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from sections import telemetry_cost
from sections.record import measure

RECORD = Path(__file__).with_suffix(".md")


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Of the sections; all where none is named.")] = None,
    record: Annotated[bool, typer.Option(help="Replace the section in telemetry.md beside this script.")] = False,
) -> None:
    """Measure and print."""
    measure({"Overhead": telemetry_cost.section}, names, Path(__file__), RECORD if record else None)


if __name__ == "__main__":
    typer.run(main)
