#!/usr/bin/env python
"""Writes label maps from a COCO file with masks, for `piip-scale shards pack label-maps`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from piip_scale.cli.endings import in_one_line
from piip_scale.data.packing.coco_maps import write_label_maps


def main(
    annotations: Annotated[Path, typer.Argument(help="COCO annotation file (JSON) with masks.")],
    images: Annotated[Path, typer.Argument(help="Folder that the file names in it are relative to.")],
    out: Annotated[Path, typer.Argument(help="Where to write images/ (links) and label_maps/.")],
) -> None:
    """Write the label maps, and the names of the classes in class_names.txt; pixels of no object are class 0."""
    names = write_label_maps(annotations, images, out)
    (out / "class_names.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    typer.echo(f"{out}: {', '.join(names)}")


if __name__ == "__main__":
    in_one_line(partial(typer.run, main), Path(__file__).name)
