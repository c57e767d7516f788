#!/usr/bin/env python
"""Measures converting and writes Markdown: all sections, or those named; ``--record`` puts them into convert.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from sections import converting, layouts
from sections.record import measure

RECORD = Path(__file__).with_suffix(".md")
# A section returns its Markdown, without its heading.
SECTIONS: dict[str, Callable[[], str]] = {
    "Layouts": layouts.section,
    "Against DeepSpeed": converting.section,
    "Large": converting.large_section,
}
_NAMES = f"Of {', '.join(SECTIONS)}; all where none is named."


def main(
    names: Annotated[list[str] | None, typer.Argument(help=_NAMES)] = None,
    record: Annotated[bool, typer.Option(help="Replace the sections in convert.md beside this script.")] = False,
    into: Annotated[Path, typer.Option(help="Another file for --record.")] = RECORD,
) -> None:
    """Measure and print."""
    measure(SECTIONS, names, Path(__file__), into if record else None)


if __name__ == "__main__":
    typer.run(main)
