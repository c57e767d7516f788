"""``piip-scale shards``: packing data sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from piip_scale.data.packing import Progress
    from piip_scale.data.shards import Manifest

app = typer.Typer(no_args_is_help=True, help="Pack data sets into shards that stream, check them, look at them.")
Folder = Annotated[Path, typer.Argument(help="Folder of packed shards.")]


@app.command()
def pack(
    coco: Annotated[Path, typer.Option(help="COCO annotation file (JSON) with boxes, and masks if there are any.")],
    images: Annotated[Path, typer.Option(help="Folder that the file names in it are relative to.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards; made if absent.")],
    target_mb: Annotated[float, typer.Option(help="Size to aim at for one shard, in megabytes.")] = 256.0,
    target_samples: Annotated[int | None, typer.Option(min=1, help="Most images in one shard.")] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Class names in label order, one each; default: the file's.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read and check images; default: all cores.")
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

    with progress_bar(f"packing {coco.name}") as on_progress:
        manifest = pack_coco(
            coco,
            images,
            out,
            classes=classes or (),
            target_mb=target_mb,
            target_samples=target_samples,
            workers=workers,
            clip_boxes=clip_boxes,
            boxes_only=boxes_only,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    typer.echo(f"{out}: {describe(manifest)}")


@app.command()
def verify(
    folder: Folder,
    other: Annotated[Path | None, typer.Option(help="A set that must not share images, such as validation's.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that read; default: all cores.")] = None,
) -> None:
    """Read a packed set to the last byte: checksums, images, boxes and masks.

    Prints one line a problem and ends with exit code 1 if there are any.

    Example: `piip-scale shards verify shards/train --other shards/val`
    """
    from piip_scale.data.verify import verify_shards

    with progress_bar(f"reading {folder}") as on_progress:
        report = verify_shards(folder, other=other, workers=workers, on_progress=on_progress)
    for line in report.problems:
        typer.echo(line)
    for here, there in report.shared_images:
        typer.echo(f"{here} is the same image as {there} in {other}")
    faults = len(report.problems) + len(report.shared_images)
    typer.echo(f"{folder}: {report.num_samples} images, {report.num_targets} objects, {faults} problems")
    raise typer.Exit(int(faults > 0))


@app.command()
def show(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="Draw a contact sheet there (.png).")] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images on the sheet, spread evenly over the set.")] = 12,
) -> None:
    """Say what a packed set holds, and draw some of it with its boxes and masks.

    Example: `piip-scale shards show shards/train --out train.png`
    """
    from rich.console import Console

    from piip_scale.cli.contact import draw_contact_sheet, summary_table
    from piip_scale.data.shards import ShardSet
    from piip_scale.data.summary import summarise

    shards = ShardSet.open(folder)
    Console().print(summary_table(folder, summarise(shards)))
    if out is not None:
        draw_contact_sheet(shards, out, num_images)
        typer.echo(f"picture: {out}")


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar on standard error, nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(title, total=None)

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
