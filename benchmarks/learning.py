#!/usr/bin/env python
"""Trains PIIP beside its own branches on small sets and writes Markdown; ``--record`` puts it into learning.md."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from sections.learning import SETS, section
from sections.record import measure

_NAMES = f"Of {', '.join(SETS)}; all where none is named."


def main(
    names: Annotated[list[str] | None, typer.Argument(help=_NAMES)] = None,
    record: Annotated[bool, typer.Option(help="Replace the sections in learning.md beside this script.")] = False,
) -> None:
    """Measure and print; needs the packed sets in learning/shards (or $LEARNING_FOLDER), and two hours of a core."""
    sections = {name: partial(section, name) for name in SETS}
    measure(sections, names, Path(__file__), Path(__file__).with_suffix(".md") if record else None)


if __name__ == "__main__":
    typer.run(main)
