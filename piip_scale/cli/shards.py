"""``piip-scale shards``: packing data sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from piip_scale.errors import DataError

if TYPE_CHECKING:
    from piip_scale.data.packing import Progress
    from piip_scale.data.sample import SetKind
    from piip_scale.data.shards import Manifest

app = typer.Typer(no_args_is_help=True, help="Pack data sets into shards that stream, check them, look at them.")
Location = Annotated[
    str, typer.Argument(help="Packed shards: a folder, http(s)://, s3://, gs://, or pipe:COMMAND with {name} in it.")
]
_TARGETS: dict[SetKind, str] = {"detection": "objects", "classification": "labels", "segmentation": "label maps"}


@app.command()
def pack(
    out: Annotated[Path, typer.Option(help="Folder for the shards; made if absent.")],
    coco: Annotated[
        Path | None, typer.Option(help="COCO annotation file (JSON) with boxes, and masks if there are any.")
    ] = None,
    image_folders: Annotated[
        Path | None, typer.Option(help="Folder with a folder of images for each class, for classification.")
    ] = None,
    image_list: Annotated[
        Path | None, typer.Option(help="List of images, PATH LABEL in each line, for classification.")
    ] = None,
    label_maps: Annotated[
        Path | None, typer.Option(help="Folder of label maps (8-bit PNG), named as --images, for segmentation.")
    ] = None,
    reduce_zero_label: Annotated[
        bool, typer.Option("--reduce-zero-label", help="In label maps 0 is no class, as in ADE20K.")
    ] = False,
    images: Annotated[Path | None, typer.Option(help="Folder that the file names in it are relative to.")] = None,
    target_mb: Annotated[float, typer.Option(help="Size to aim at for one shard, in megabytes.")] = 256.0,
    target_samples: Annotated[int | None, typer.Option(min=1, help="Most images in one shard.")] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Class names in label order, one each; default: the input's.")
    ] = None,
    class_names: Annotated[Path | None, typer.Option(help="Text file of them instead, a name in each line.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read and check images; default: all cores.")
    ] = None,
    clip_boxes: Annotated[
        bool, typer.Option("--clip-boxes", help="Cut boxes that stick out, not refuse them.")
    ] = False,
    boxes_only: Annotated[bool, typer.Option("--boxes-only", help="Leave masks out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a set of another input in --out.")] = False,
) -> None:
    """Pack a data set into tar shards, each with an index, and one manifest for all.

    From a COCO file for detection; from image folders, or a list of images with labels, for classification; from two
    folders of images and label maps for segmentation. Images are checked and stored as they are. The same input gives
    the same bytes; a second call on a finished folder does nothing; a killed one continues. Any webdataset reader, and
    plain tar, can read the shards.

    Example: `piip-scale shards pack --coco ann.json --images DIR --out shards/train`
    """
    from piip_scale.data.pack import pack_coco
    from piip_scale.data.pack_classes import pack_folders, pack_list
    from piip_scale.data.pack_maps import pack_label_maps
    from piip_scale.data.packing import PackOptions

    source = _only_source(coco=coco, image_folders=image_folders, image_list=image_list, label_maps=label_maps)
    if (source == image_folders) != (images is None):
        raise DataError(
            "--images",
            value=str(images or ""),
            rule="it goes with --coco, --image-list and --label-maps, and only with them",
        )
    if source != coco and (clip_boxes or boxes_only):
        raise DataError("--clip-boxes and --boxes-only", rule="they go with --coco alone", fix="leave them out")
    if source != label_maps and reduce_zero_label:
        raise DataError("--reduce-zero-label", rule="it goes with --label-maps alone", fix="leave it out")
    names = _classes(classes, class_names)
    with progress_bar(f"packing {source.name}") as on_progress:
        how = PackOptions(target_mb, target_samples, workers, overwrite, on_progress)
        if image_folders is not None:
            manifest = pack_folders(image_folders, out, classes=names, how=how)
        elif label_maps is not None:
            manifest = pack_label_maps(
                cast(Path, images), label_maps, out, classes=names, reduce_zero_label=reduce_zero_label, how=how
            )
        elif image_list is not None:
            manifest = pack_list(image_list, cast(Path, images), out, classes=names, how=how)
        else:
            manifest = pack_coco(
                source,
                cast(Path, images),
                out,
                classes=names,
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
    location: Location,
    other: Annotated[str | None, typer.Option(help="A set that must not share images, such as validation's.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that read; default: all cores.")] = None,
) -> None:
    """Read a packed set to the last byte: checksums, images, labels, label maps, boxes and masks.

    One that is not in a folder is fetched anew for that, shard by shard.

    Prints one line a problem and ends with exit code 1 if there are any.

    Example: `piip-scale shards verify shards/train --other shards/val`
    """
    from piip_scale.data.verify import verify_shards

    with progress_bar(f"reading {location}") as on_progress:
        report = verify_shards(location, other=other, workers=workers, on_progress=on_progress)
    for line in report.problems:
        typer.echo(line)
    for here, there in report.shared_images:
        typer.echo(f"{here} is the same image as {there} in {other}")
    faults = len(report.problems) + len(report.shared_images)
    targets = f"{report.num_targets} {_TARGETS[report.kind]}"
    typer.echo(f"{location}: {report.num_samples} images, {targets}, {faults} problems")
    raise typer.Exit(int(faults > 0))


@app.command()
def show(
    location: Location,
    out: Annotated[Path | None, typer.Option(help="Draw a contact sheet there (.png).")] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images on the sheet, spread evenly over the set.")] = 12,
) -> None:
    """Say what a packed set holds, and draw some of it with its boxes and masks, label maps or class names.

    Example: `piip-scale shards show shards/train --out train.png`
    """
    from rich.console import Console

    from piip_scale.cli.contact import draw_contact_sheet, summary_table
    from piip_scale.data.shards import ShardSet

    shards = ShardSet.open(location)
    Console().print(summary_table(shards))
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


def _only_source(**sources: Path | None) -> Path:
    """The one that is given."""
    given = {name: path for name, path in sources.items() if path is not None}
    if len(given) != 1:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sources)
        raise DataError("what to pack", value=[str(path) for path in given.values()], rule=f"exactly one of {options}")
    return next(iter(given.values()))


def _classes(names: list[str] | None, file: Path | None) -> tuple[str, ...]:
    from piip_scale.data.pack_classes import read_class_names

    if names and file is not None:
        raise DataError("--class and --class-names", rule="they are two ways to name classes", fix="use one of them")
    return read_class_names(file) if file is not None else tuple(names or ())


def describe(manifest: Manifest, most_classes: int = 8) -> str:
    """One line: images, objects or labels, shards, classes."""
    names = [category.name for category in manifest.categories]
    shown = ", ".join(names[:most_classes]) + (", ..." if len(names) > most_classes else "")
    boxes = "boxes with masks" if manifest.has_masks else "boxes"
    targets = boxes if manifest.kind == "detection" else _TARGETS[manifest.kind]
    return (
        f"{manifest.num_samples} images, {manifest.num_annotations} {targets}, {len(manifest.shards)} shard(s), "
        f"{len(names)} class(es): {shown}"
    )
