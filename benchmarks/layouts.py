#!/usr/bin/env python
"""Measures layouts on nodes with a limited network and writes Markdown; ``--record`` puts it into layouts.md.

Needs root, and iproute2 with tc: each node is a network namespace. Best on a machine that does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from sections import network_layouts
from sections.record import measure

RECORD = Path(__file__).with_suffix(".md")
SECTIONS: dict[str, Callable[[], str]] = {"Layouts": network_layouts.section}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Of the sections; all where none is named.")] = None,
    record: Annotated[bool, typer.Option(help="Replace the sections in layouts.md beside this script.")] = False,
) -> None:
    """Measure and print."""
    measure(SECTIONS, names, Path(__file__), RECORD if record else None)


if __name__ == "__main__":
    typer.run(main)
