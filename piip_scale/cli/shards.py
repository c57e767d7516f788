"""``piip-scale shards``: packing data sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from piip_scale.data.pack import Progress
    from piip_scale.data.shards import Manifest

app = typer.Typer(no_args_is_help=True, help="Pack data sets into shards that stream.")


@app.command()
def pack(
    coco: Annotated[Path, typer.Option(help="COCO annotation file (JSON) with boxes, and masks if there are any.")],
    images: Annotated[Path, typer.Option(help="Folder that the file names in it are relative to.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards; made if absent.")],
    target_mb: Annotated[float, typer.Option(help="Size to aim at for one shard, in megabytes.")] = 256.0,
    workers: Annotated[
        int | None, typer.Option(help="Processes that read and check images; default: all cores.")
    ] = None,
    clip_boxes: Annotated[
        bool, typer.Option("--clip-boxes", help="Cut boxes that stick out, not refuse them.")
    ] = False,
    boxes_only: Annotated[bool, typer.Option("--boxes-only", help="Leave masks out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a set of another input in --out.")] = False,
) -> None:
    """Pack a COCO data set into tar shards, each with an index, and one manifest for all.

    Images are checked and stored as they are. The same input gives the same bytes; a second call on a finished folder
    does nothing; a killed one continues. Any webdataset reader, and plain tar, can read the shards.

    Example: `piip-scale shards pack --coco ann.json --images DIR --out shards/train`
    """
    from piip_scale.data.pack import pack_coco

    with packing_bar(coco.name) as on_progress:
        manifest = pack_coco(
            coco,
            images,
            out,
            target_mb=target_mb,
            workers=workers,
            clip_boxes=clip_boxes,
            boxes_only=boxes_only,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    typer.echo(f"{out}: {describe(manifest)}")


@contextmanager
def packing_bar(name: str) -> Iterator[Progress]:
    """A progress bar for ``pack_coco``."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(f"packing {name}", total=None)

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        yield show


def describe(manifest: Manifest, most_classes: int = 8) -> str:
    """One line: images, objects, shards, classes."""
    names = [category.name for category in manifest.categories]
    shown = ", ".join(names[:most_classes]) + (", ..." if len(names) > most_classes else "")
    objects = "boxes with masks" if manifest.has_masks else "boxes"
    return (
        f"{manifest.num_samples} images, {manifest.num_annotations} {objects}, {len(manifest.shards)} shard(s), "
        f"{len(names)} class(es): {shown}"
    )
