#!/usr/bin/env python
"""Writes a small classification set: handwritten digits, one folder of images for each class."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from piip_scale.cli.endings import in_one_line
from piip_scale.demo.digits import write_digits


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write train/DIGIT/ and val/DIGIT/.")],
    size_px: Annotated[int, typer.Option(help="Side of the square images.")] = 32,
) -> None:
    """Write the data set; the same arguments give the same bytes."""
    counts = write_digits(folder, size_px=size_px)
    typer.echo("\n".join(f"{folder / split}: {count} images" for split, count in counts.items()))


if __name__ == "__main__":
    in_one_line(partial(typer.run, main), Path(__file__).name)
