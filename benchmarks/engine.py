#!/usr/bin/env python
"""Measures the engine and writes Markdown: all sections, or those named; ``--record`` puts them into engine.md."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from sections import memory
from sections.record import RECORD, provenance, replaced

from piip_scale.files import write_text_atomically

# A section returns its Markdown, without its heading.
SECTIONS: dict[str, Callable[[], str]] = {
    "Memory": memory.section,
}
_NAMES = f"Of {', '.join(SECTIONS)}; all where none is named."


def main(
    names: Annotated[list[str] | None, typer.Argument(help=_NAMES)] = None,
    record: Annotated[bool, typer.Option(help="Replace the sections in engine.md beside this script.")] = False,
    into: Annotated[Path, typer.Option(help="Another file for --record.")] = RECORD,
) -> None:
    """Measure and print; every section says when, where and with what it was measured."""
    unknown = sorted(set(names or ()) - SECTIONS.keys())
    if unknown:
        raise typer.BadParameter(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    for name in names or SECTIONS:
        text = f"{SECTIONS[name]().strip()}\n\n{provenance(name)}"
        typer.echo(f"## {name}\n\n{text}\n")
        sys.stdout.flush()
        if record:
            write_text_atomically(into, replaced(into.read_text(encoding="utf-8"), name, text))


if __name__ == "__main__":
    typer.run(main)
