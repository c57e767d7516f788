#!/usr/bin/env python
"""Measures reading and augmenting, and results of large images; ``--record`` puts the Markdown into data.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from sections import aspect, image_reader, large_masks, loading, mask_targets, streaming, throughput
from sections.record import measure

RECORD = Path(__file__).with_suffix(".md")
# A section returns its Markdown, without its heading.
SECTIONS: dict[str, Callable[[], str]] = {
    "Throughput": throughput.section,
    "Mask targets": mask_targets.section,
    "Loader": loading.section,
    "Memory": loading.memory_section,
    "Aspect": aspect.section,
    "Streaming": streaming.section,
    "Image reader": image_reader.section,
    "Large masks": large_masks.section,
}
_NAMES = f"Of {', '.join(SECTIONS)}; all where none is named."


def main(
    names: Annotated[list[str] | None, typer.Argument(help=_NAMES)] = None,
    record: Annotated[bool, typer.Option(help="Replace the sections in data.md beside this script.")] = False,
    into: Annotated[Path, typer.Option(help="Another file for --record.")] = RECORD,
) -> None:
    """Measure and print."""
    measure(SECTIONS, names, Path(__file__), into if record else None)


if __name__ == "__main__":
    typer.run(main)
