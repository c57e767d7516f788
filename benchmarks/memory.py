#!/usr/bin/env python
"""Measures what a rank's tensors hold against its plan and writes Markdown; ``--record`` puts it into memory.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from sections import memory_plans
from sections.record import measure

RECORD = Path(__file__).with_suffix(".md")
SECTIONS: dict[str, Callable[[], str]] = {"Plans": memory_plans.section}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Of the sections; all where none is named.")] = None,
    record: Annotated[bool, typer.Option(help="Replace the sections in memory.md beside this script.")] = False,
) -> None:
    """Measure and print."""
    measure(SECTIONS, names, Path(__file__), RECORD if record else None)


if __name__ == "__main__":
    typer.run(main)
