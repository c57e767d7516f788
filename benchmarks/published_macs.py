#!/usr/bin/env python
"""Writes the published multiply-accumulates beside ours as Markdown, for published_macs.md."""

import json
from pathlib import Path
from typing import Annotated

import typer
from sections.published_counts import compare_published, published_table


def main(
    tables: Annotated[Path, typer.Argument(help="Published rows (JSON): name, config, resolution, flops_G.")],
    backbones: Annotated[Path, typer.Argument(help="model.backbone of the released configs, by path (JSON).")],
) -> None:
    """Print the table that benchmarks/published_macs.md holds."""
    typer.echo(published_table(compare_published(json.loads(tables.read_text()), json.loads(backbones.read_text()))))


if __name__ == "__main__":
    typer.run(main)
