"""``piip-scale shards pack KIND``: data sets of several kinds to shards, a command for each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from piip_scale.cli.pack_options import Shared, with_shared

if TYPE_CHECKING:
    from piip_scale.data.packing.packing import PackOptions
    from piip_scale.data.reading.manifest import Manifest

app = typer.Typer(
    no_args_is_help=True,
    help=(
        "Pack a data set into tar shards, each with an index, and one manifest for all.\n\n"
        "Images are checked and stored as they are. The same input gives the same bytes; a second call on a finished "
        "folder does nothing; a killed one continues. Any webdataset reader, and plain tar, can read the shards.\n\n"
        "Example: `piip-scale shards pack coco ann.json --images DIR --out shards/train`"
    ),
)

Out = Annotated[Path, typer.Option(help="Folder for the shards; made if absent.")]
Images = Annotated[Path, typer.Option(help="Folder that the names in it are relative to.")]
ClipBoxes = Annotated[bool, typer.Option("--clip-boxes", help="Cut boxes that stick out, not refuse them.")]


@app.command("coco")
@with_shared
def coco(
    annotations: Annotated[Path, typer.Argument(help="COCO file (JSON, or packed with gzip): boxes, perhaps masks.")],
    images: Images,
    out: Out,
    shared: Shared,
    clip_boxes: ClipBoxes = False,
    boxes_only: Annotated[bool, typer.Option("--boxes-only", help="Leave masks out.")] = False,
    drop_unused: Annotated[
        bool, typer.Option("--drop-unused", help="Leave out classes that no annotation has.")
    ] = False,
) -> None:
    """Pack a COCO file and its images, for detection.

    Example: `piip-scale shards pack coco ann.json --images DIR --out shards/train`
    """
    from piip_scale.data.packing.pack import pack_coco

    def packer(how: PackOptions) -> Manifest:
        return pack_coco(
            annotations,
            images,
            out,
            classes=shared.names(),
            subset=bool(shared.classes),
            drop_unused=drop_unused,
            clip_boxes=clip_boxes,
            boxes_only=boxes_only,
            how=how,
        )

    shared.pack(annotations, out, packer)


@app.command("voc")
@with_shared
def voc(
    annotations: Annotated[Path, typer.Argument(help="Folder of Pascal VOC annotations (XML).")],
    images: Images,
    out: Out,
    shared: Shared,
    voc_list: Annotated[
        Path | None, typer.Option(help="Names to take, one in a line, as ImageSets/Main/train.txt; default: all.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Folder of instance maps (SegmentationObject); default: boxes only.")
    ] = None,
    clip_boxes: ClipBoxes = False,
) -> None:
    """Pack Pascal VOC annotations and their images, for detection.

    Example: `piip-scale shards pack voc Annotations --images JPEGImages --voc-list train.txt --out shards/train`
    """
    from piip_scale.data.packing.pack import pack_voc

    def packer(how: PackOptions) -> Manifest:
        return pack_voc(
            annotations,
            images,
            out,
            names=voc_list,
            instance_maps=masks,
            classes=shared.names(),
            subset=bool(shared.classes),
            clip_boxes=clip_boxes,
            how=how,
        )

    shared.pack(annotations, out, packer)


@app.command("label-maps")
@with_shared
def label_maps(
    maps: Annotated[Path, typer.Argument(help="Folder of label maps (PNG), named as the images are.")],
    images: Images,
    out: Out,
    shared: Shared,
    reduce_zero_label: Annotated[
        bool, typer.Option("--reduce-zero-label", help="0 is no class, as in ADE20K.")
    ] = False,
) -> None:
    """Pack label maps and their images, for segmentation.

    Example: `piip-scale shards pack label-maps MAPS --images DIR --class-names names.txt --out shards/train`
    """
    from piip_scale.data.packing.pack_maps import pack_label_maps

    def packer(how: PackOptions) -> Manifest:
        names = shared.listed_names()
        return pack_label_maps(images, maps, out, classes=names, reduce_zero_label=reduce_zero_label, how=how)

    shared.pack(maps, out, packer)


@app.command("image-folders")
@with_shared
def image_folders(
    folder: Annotated[Path, typer.Argument(help="Folder with a folder of images for each class.")],
    out: Out,
    shared: Shared,
) -> None:
    """Pack folders of images, one for each class, for classification.

    Example: `piip-scale shards pack image-folders photos/train --out shards/train`
    """
    from piip_scale.data.packing.pack_classes import pack_folders

    def packer(how: PackOptions) -> Manifest:
        return pack_folders(folder, out, classes=shared.names(), subset=bool(shared.classes), how=how)

    shared.pack(folder, out, packer)


@app.command("image-list")
@with_shared
def image_list(
    listing: Annotated[Path, typer.Argument(metavar="LIST", help="Text file, PATH LABEL in each line.")],
    out: Out,
    shared: Shared,
    images: Annotated[
        Path | None, typer.Option(help="Folder that its paths are relative to; default: the list's own.")
    ] = None,
) -> None:
    """Pack the images that a list names with their labels, as ImageNet's lists do, for classification.

    Example: `piip-scale shards pack image-list val.txt --images DIR --class-names names.txt --out shards/val`
    """
    from piip_scale.data.packing.pack_classes import pack_list

    def packer(how: PackOptions) -> Manifest:
        return pack_list(listing, images or listing.parent, out, classes=shared.listed_names(), how=how)

    shared.pack(listing, out, packer)
