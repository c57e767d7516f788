#!/usr/bin/env python
"""Plans the configs around foundation models and writes Markdown; ``--record`` puts it into docs/foundation.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from sections.foundation_plans import section
from sections.record import measure

_DOCS = Path(__file__).parents[1] / "docs" / "foundation.md"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Plans; all where none is named.")] = None,
    record: Annotated[bool, typer.Option(help="Replace the section in docs/foundation.md.")] = False,
) -> None:
    """Plan and print; minutes of a core."""
    measure({"Plans": section}, names, Path(__file__), _DOCS if record else None)


if __name__ == "__main__":
    typer.run(main)
