"""``piip-scale shards pack``: data sets of several kinds to shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from piip_scale.cli.progress import progress_bar
from piip_scale.errors import DataError

if TYPE_CHECKING:
    from piip_scale.data.packing.packing import PackOptions
    from piip_scale.data.reading.shards import Manifest
    from piip_scale.data.sample import SetKind

TARGETS: dict[SetKind, str] = {"detection": "objects", "classification": "labels", "segmentation": "label maps"}

_SOURCES = "What to pack: one of these"
_OF_SOURCES = "What goes with it"

# Options that go with some sources alone, by the name of each source.
_TAKES = {
    "coco": ("images", "clip_boxes", "boxes_only"),
    "voc": ("images", "voc_list", "voc_masks", "clip_boxes"),
    "image_folders": (),
    "image_list": ("images",),
    "label_maps": ("images", "reduce_zero_label"),
}


def pack(
    out: Annotated[Path, typer.Option(help="Folder for the shards; made if absent.")],
    coco: Annotated[
        Path | None,
        typer.Option(help="COCO file (JSON): boxes, and masks if there are any.", rich_help_panel=_SOURCES),
    ] = None,
    voc: Annotated[
        Path | None, typer.Option(help="Folder of Pascal VOC annotations (XML): boxes.", rich_help_panel=_SOURCES)
    ] = None,
    image_folders: Annotated[
        Path | None,
        typer.Option(help="Folder with a folder of images for each class: classification.", rich_help_panel=_SOURCES),
    ] = None,
    image_list: Annotated[
        Path | None,
        typer.Option(help="List of images, PATH LABEL in each line: classification.", rich_help_panel=_SOURCES),
    ] = None,
    label_maps: Annotated[
        Path | None,
        typer.Option(
            help="Folder of label maps (8-bit PNG) named as --images: segmentation.", rich_help_panel=_SOURCES
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that the names in it are relative to.", rich_help_panel=_OF_SOURCES)
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class", help="Class names in label order, one each; default: the input's.", rich_help_panel=_OF_SOURCES
        ),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(help="Text file of them instead, a name in each line.", rich_help_panel=_OF_SOURCES),
    ] = None,
    clip_boxes: Annotated[
        bool,
        typer.Option("--clip-boxes", help="Cut boxes that stick out, not refuse them.", rich_help_panel=_OF_SOURCES),
    ] = False,
    boxes_only: Annotated[
        bool, typer.Option("--boxes-only", help="Leave COCO's masks out.", rich_help_panel=_OF_SOURCES)
    ] = False,
    voc_list: Annotated[
        Path | None,
        typer.Option(help="Names to take of --voc, as ImageSets/Main/train.txt.", rich_help_panel=_OF_SOURCES),
    ] = None,
    voc_masks: Annotated[
        Path | None,
        typer.Option(help="Folder of --voc's instance maps, SegmentationObject.", rich_help_panel=_OF_SOURCES),
    ] = None,
    reduce_zero_label: Annotated[
        bool,
        typer.Option(
            "--reduce-zero-label", help="In label maps 0 is no class, as in ADE20K.", rich_help_panel=_OF_SOURCES
        ),
    ] = False,
    target_mb: Annotated[float, typer.Option(help="Size to aim at for one shard, in megabytes.")] = 256.0,
    target_samples: Annotated[int | None, typer.Option(min=1, help="Most images in one shard.")] = None,
    jpeg_quality: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="Compress images again where that makes them smaller; default: never."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read and check images; default: all cores.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a set of another input in --out.")] = False,
) -> None:
    """Pack a data set into tar shards, each with an index, and one manifest for all.

    Images are checked and stored as they are. The same input gives the same bytes; a second call on a finished folder
    does nothing; a killed one continues. Any webdataset reader, and plain tar, can read the shards.

    Example: `piip-scale shards pack --coco ann.json --images DIR --out shards/train`
    """
    from piip_scale.data.packing.packing import PackOptions

    sources = {
        "coco": coco,
        "voc": voc,
        "image_folders": image_folders,
        "image_list": image_list,
        "label_maps": label_maps,
    }
    options = {
        "images": images,
        "clip_boxes": clip_boxes,
        "boxes_only": boxes_only,
        "voc_list": voc_list,
        "voc_masks": voc_masks,
        "reduce_zero_label": reduce_zero_label,
    }
    kind, source = _only_source(sources)
    _check_options(kind, options)
    packer = partial(_PACKERS[kind], source, out, _classes(classes, class_names), options)
    with progress_bar(f"packing {source.name}") as on_progress:
        how = PackOptions(target_mb, target_samples, workers, overwrite, on_progress, jpeg_quality)
        manifest = packer(how)
    typer.echo(f"{out}: {describe(manifest)}")


def describe(manifest: Manifest, most_classes: int = 8) -> str:
    """One line: images, objects or labels, shards, classes."""
    names = [category.name for category in manifest.categories]
    shown = ", ".join(names[:most_classes]) + (", ..." if len(names) > most_classes else "")
    boxes = "boxes with masks" if manifest.has_masks else "boxes"
    targets = boxes if manifest.kind == "detection" else TARGETS[manifest.kind]
    return (
        f"{manifest.num_samples} images, {manifest.num_annotations} {targets}, {len(manifest.shards)} shard(s), "
        f"{len(names)} class(es): {shown}"
    )


def _only_source(sources: dict[str, Path | None]) -> tuple[str, Path]:
    """The one that is given, and its name."""
    given = {name: path for name, path in sources.items() if path is not None}
    if len(given) != 1:
        options = ", ".join(map(_flag, sources))
        raise DataError("what to pack", value=[str(path) for path in given.values()], rule=f"exactly one of {options}")
    return next(iter(given.items()))


def _check_options(kind: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value and name not in _TAKES[kind]:
            takers = ", ".join(_flag(taker) for taker, taken in _TAKES.items() if name in taken)
            raise DataError(f"{_flag(name)} with {_flag(kind)}", rule=f"it goes with {takers}", fix="leave it out")
    if options["images"] is None and "images" in _TAKES[kind]:
        raise DataError("--images is not given", rule=f"{_flag(kind)} needs the folder of its images")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _classes(names: list[str] | None, file: Path | None) -> tuple[str, ...]:
    from piip_scale.data.packing.pack_classes import read_class_names

    if names and file is not None:
        raise DataError("--class and --class-names", rule="they are two ways to name classes", fix="use one of them")
    return read_class_names(file) if file is not None else tuple(names or ())


def _coco(source: Path, out: Path, classes: tuple[str, ...], options: dict[str, Any], how: PackOptions) -> Manifest:
    from piip_scale.data.packing.pack import pack_coco

    return pack_coco(
        source,
        options["images"],
        out,
        classes=classes,
        target_mb=how.target_mb,
        target_samples=how.target_samples,
        workers=how.workers,
        clip_boxes=options["clip_boxes"],
        boxes_only=options["boxes_only"],
        overwrite=how.overwrite,
        on_progress=how.on_progress,
        jpeg_quality=how.jpeg_quality,
    )


def _voc(source: Path, out: Path, classes: tuple[str, ...], options: dict[str, Any], how: PackOptions) -> Manifest:
    from piip_scale.data.packing.pack import pack_voc

    return pack_voc(
        source,
        options["images"],
        out,
        names=options["voc_list"],
        instance_maps=options["voc_masks"],
        classes=classes,
        clip_boxes=options["clip_boxes"],
        how=how,
    )


def _folders(source: Path, out: Path, classes: tuple[str, ...], _: dict[str, Any], how: PackOptions) -> Manifest:
    from piip_scale.data.packing.pack_classes import pack_folders

    return pack_folders(source, out, classes=classes, how=how)


def _list(source: Path, out: Path, classes: tuple[str, ...], options: dict[str, Any], how: PackOptions) -> Manifest:
    from piip_scale.data.packing.pack_classes import pack_list

    return pack_list(source, options["images"], out, classes=classes, how=how)


def _maps(source: Path, out: Path, classes: tuple[str, ...], options: dict[str, Any], how: PackOptions) -> Manifest:
    from piip_scale.data.packing.pack_maps import pack_label_maps

    zero = options["reduce_zero_label"]
    return pack_label_maps(options["images"], source, out, classes=classes, reduce_zero_label=zero, how=how)


_PACKERS: dict[str, Callable[..., Manifest]] = {
    "coco": _coco,
    "voc": _voc,
    "image_folders": _folders,
    "image_list": _list,
    "label_maps": _maps,
}
