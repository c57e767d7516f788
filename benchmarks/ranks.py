#!/usr/bin/env python
"""Evaluates what ranks ask of the shared disk, up to 512 of them; ``--record`` puts it into ranks.md and ranks.png."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from sections import rank_costs
from sections.record import measure

RECORD = Path(__file__).with_suffix(".md")


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Of the sections; all where none is named.")] = None,
    record: Annotated[bool, typer.Option(help="Replace ranks.md and ranks.png beside this script.")] = False,
) -> None:
    """Evaluate and print."""
    measure({"Costs": rank_costs.section}, names, Path(__file__), RECORD if record else None)
    if record:
        rank_costs.draw(RECORD.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
