#!/usr/bin/env python
"""Measures the family of networks and writes Markdown; ``--record`` puts it into family.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from sections import building, golden, large_model, published, windows
from sections.record import measure

# A section returns its Markdown, without its heading.
SECTIONS: dict[str, Callable[[], str]] = {
    "Golden": golden.section,
    "Published": published.section,
    "Meta": building.meta_section,
    "Bfloat16": building.bf16_section,
    "Windows": windows.section,
    "Evaluation": large_model.section,
}
_NAMES = f"Of {', '.join(SECTIONS)}; all where none is named."


def main(
    names: Annotated[list[str] | None, typer.Argument(help=_NAMES)] = None,
    record: Annotated[bool, typer.Option(help="Replace the sections in family.md beside this script.")] = False,
) -> None:
    """Measure and print; needs the reference files beside the checkout, 18 GiB of memory, and 14 GB of disk."""
    measure(SECTIONS, names, Path(__file__), Path(__file__).with_suffix(".md") if record else None)


if __name__ == "__main__":
    typer.run(main)
