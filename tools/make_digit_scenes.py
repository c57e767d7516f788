#!/usr/bin/env python
"""Writes the demo's data set: handwritten digits on photographs, as COCO files and JPEGs."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from piip_scale.cli.endings import in_one_line
from piip_scale.demo.scenes import write_scenes


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write images/ and instances_{train,val}.json.")],
    num_train: Annotated[int, typer.Option(help="Training images.")] = 1600,
    num_val: Annotated[int, typer.Option(help="Validation images, of other digits and places.")] = 160,
    size_px: Annotated[int, typer.Option(help="Side of the square images.")] = 128,
    seed: Annotated[int, typer.Option(help="Everything drawn follows from it.")] = 0,
) -> None:
    """Write the data set; the same arguments give the same bytes, and a finished folder is reused."""
    paths = write_scenes(folder, num_train=num_train, num_val=num_val, size_px=size_px, seed=seed)
    typer.echo(f"{paths.images}\n{paths.train}\n{paths.val}")


if __name__ == "__main__":
    in_one_line(partial(typer.run, main), Path(__file__).name)
