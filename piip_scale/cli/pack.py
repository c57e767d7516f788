"""``piip-scale shards pack KIND``: data sets of several kinds to shards, a command for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from piip_scale.cli.progress import progress_bar
from piip_scale.data.set_kinds import SET_KINDS
from piip_scale.errors import DataError

if TYPE_CHECKING:
    from piip_scale.data.packing.packing import PackOptions
    from piip_scale.data.reading.shards import Manifest

app = typer.Typer(
    no_args_is_help=True,
    help=(
        "Pack a data set into tar shards, each with an index, and one manifest for all.\n\n"
        "Images are checked and stored as they are. The same input gives the same bytes; a second call on a finished "
        "folder does nothing; a killed one continues. Any webdataset reader, and plain tar, can read the shards.\n\n"
        "Example: `piip-scale shards pack coco ann.json --images DIR --out shards/train`"
    ),
)

_SHARDS = "How shards are written"

Out = Annotated[Path, typer.Option(help="Folder for the shards; made if absent.")]
Images = Annotated[Path, typer.Option(help="Folder that the names in it are relative to.")]
ClassNames = Annotated[Path | None, typer.Option(help="Text file of class names in label order, one in a line.")]
Classes = Annotated[list[str] | None, typer.Option("--class", help="Class names in label order, one each.")]
ClipBoxes = Annotated[bool, typer.Option("--clip-boxes", help="Cut boxes that stick out, not refuse them.")]
TargetMb = Annotated[float, typer.Option(help="Size to aim at for one shard, in megabytes.", rich_help_panel=_SHARDS)]
TargetSamples = Annotated[int | None, typer.Option(min=1, help="Most images in one shard.", rich_help_panel=_SHARDS)]
JpegQuality = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=100,
        help="Compress images again where that makes them smaller; default: never.",
        rich_help_panel=_SHARDS,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that read and check images; default: all cores.", rich_help_panel=_SHARDS),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a set of another input in --out.", rich_help_panel=_SHARDS)
]


@app.command("coco")
def coco(
    annotations: Annotated[Path, typer.Argument(help="COCO file (JSON): boxes, and masks if there are any.")],
    images: Images,
    out: Out,
    class_names: ClassNames = None,
    classes: Classes = None,
    clip_boxes: ClipBoxes = False,
    boxes_only: Annotated[bool, typer.Option("--boxes-only", help="Leave masks out.")] = False,
    target_mb: TargetMb = 256.0,
    target_samples: TargetSamples = None,
    jpeg_quality: JpegQuality = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Pack a COCO file and its images, for detection.

    Example: `piip-scale shards pack coco ann.json --images DIR --out shards/train`
    """
    from piip_scale.data.packing.pack import pack_coco

    names = _class_names(class_names, classes)

    def pack(how: PackOptions) -> Manifest:
        return pack_coco(
            annotations, images, out, classes=names, clip_boxes=clip_boxes, boxes_only=boxes_only, **vars(how)
        )

    _packed(annotations, out, pack, target_mb, target_samples, jpeg_quality, workers, overwrite)


@app.command("voc")
def voc(
    annotations: Annotated[Path, typer.Argument(help="Folder of Pascal VOC annotations (XML).")],
    images: Images,
    out: Out,
    voc_list: Annotated[
        Path | None, typer.Option(help="Names to take, one in a line, as ImageSets/Main/train.txt; default: all.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Folder of instance maps (SegmentationObject); default: boxes only.")
    ] = None,
    class_names: ClassNames = None,
    classes: Classes = None,
    clip_boxes: ClipBoxes = False,
    target_mb: TargetMb = 256.0,
    target_samples: TargetSamples = None,
    jpeg_quality: JpegQuality = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Pack Pascal VOC annotations and their images, for detection.

    Example: `piip-scale shards pack voc Annotations --images JPEGImages --voc-list train.txt --out shards/train`
    """
    from piip_scale.data.packing.pack import pack_voc

    names = _class_names(class_names, classes)

    def pack(how: PackOptions) -> Manifest:
        files = annotations, images, out
        return pack_voc(*files, names=voc_list, instance_maps=masks, classes=names, clip_boxes=clip_boxes, how=how)

    _packed(annotations, out, pack, target_mb, target_samples, jpeg_quality, workers, overwrite)


@app.command("label-maps")
def label_maps(
    maps: Annotated[Path, typer.Argument(help="Folder of label maps (8-bit PNG), named as the images are.")],
    images: Images,
    out: Out,
    class_names: ClassNames = None,
    classes: Classes = None,
    reduce_zero_label: Annotated[
        bool, typer.Option("--reduce-zero-label", help="0 is no class, as in ADE20K.")
    ] = False,
    target_mb: TargetMb = 256.0,
    target_samples: TargetSamples = None,
    jpeg_quality: JpegQuality = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Pack label maps and their images, for segmentation.

    Example: `piip-scale shards pack label-maps MAPS --images DIR --class-names names.txt --out shards/train`
    """
    from piip_scale.data.packing.pack_maps import pack_label_maps

    names = _class_names(class_names, classes)

    def pack(how: PackOptions) -> Manifest:
        return pack_label_maps(images, maps, out, classes=names, reduce_zero_label=reduce_zero_label, how=how)

    _packed(maps, out, pack, target_mb, target_samples, jpeg_quality, workers, overwrite)


@app.command("image-folders")
def image_folders(
    folder: Annotated[Path, typer.Argument(help="Folder with a folder of images for each class.")],
    out: Out,
    class_names: ClassNames = None,
    classes: Classes = None,
    target_mb: TargetMb = 256.0,
    target_samples: TargetSamples = None,
    jpeg_quality: JpegQuality = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Pack folders of images, one for each class, for classification.

    Example: `piip-scale shards pack image-folders photos/train --out shards/train`
    """
    from piip_scale.data.packing.pack_classes import pack_folders

    names = _class_names(class_names, classes)

    def pack(how: PackOptions) -> Manifest:
        return pack_folders(folder, out, classes=names, how=how)

    _packed(folder, out, pack, target_mb, target_samples, jpeg_quality, workers, overwrite)


@app.command("image-list")
def image_list(
    listing: Annotated[Path, typer.Argument(metavar="LIST", help="Text file, PATH LABEL in each line.")],
    out: Out,
    images: Annotated[
        Path | None, typer.Option(help="Folder that its paths are relative to; default: the list's own.")
    ] = None,
    class_names: ClassNames = None,
    classes: Classes = None,
    target_mb: TargetMb = 256.0,
    target_samples: TargetSamples = None,
    jpeg_quality: JpegQuality = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Pack the images that a list names with their labels, as ImageNet's lists do, for classification.

    Example: `piip-scale shards pack image-list val.txt --images DIR --class-names names.txt --out shards/val`
    """
    from piip_scale.data.packing.pack_classes import pack_list

    names = _class_names(class_names, classes)

    def pack(how: PackOptions) -> Manifest:
        return pack_list(listing, images or listing.parent, out, classes=names, how=how)

    _packed(listing, out, pack, target_mb, target_samples, jpeg_quality, workers, overwrite)


def describe(manifest: Manifest, most_classes: int = 8) -> str:
    """One line: images, objects or labels, shards, classes."""
    names = [category.name for category in manifest.categories]
    shown = ", ".join(names[:most_classes]) + (", ..." if len(names) > most_classes else "")
    targets = SET_KINDS[manifest.kind].packed_targets + (" with masks" if manifest.has_masks else "")
    return (
        f"{manifest.num_samples} images, {manifest.num_annotations} {targets}, {len(manifest.shards)} shard(s), "
        f"{len(names)} class(es): {shown}"
    )


def _packed(
    source: Path,
    out: Path,
    pack: Callable[[PackOptions], Manifest],
    target_mb: float,
    target_samples: int | None,
    jpeg_quality: int | None,
    workers: int | None,
    overwrite: bool,
) -> None:
    """Packs under a progress bar and prints what came of it."""
    from piip_scale.data.packing.packing import PackOptions

    with progress_bar(f"packing {source.name}") as on_progress:
        how = PackOptions(target_mb, target_samples, workers, overwrite, on_progress, jpeg_quality)
        manifest = pack(how)
    typer.echo(f"{out}: {describe(manifest)}")


def _class_names(file: Path | None, names: list[str] | None) -> tuple[str, ...]:
    from piip_scale.data.packing.pack_classes import read_class_names

    if names and file is not None:
        raise DataError("--class and --class-names", rule="they are two ways to name classes", fix="use one of them")
    return read_class_names(file) if file is not None else tuple(names or ())
