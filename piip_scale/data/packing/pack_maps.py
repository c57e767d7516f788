"""Images with label maps, as ADE20K has them, to shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from piip_scale.data.packing.label_maps import MAX_CLASSES, MapRule
from piip_scale.data.packing.pack_classes import file_sizes, images_under, mixed
from piip_scale.data.packing.pack_plan import LabelMap, PackItem
from piip_scale.data.packing.packing import PackOptions, SetFacts, pack_items
from piip_scale.data.reading.files import json_bytes
from piip_scale.data.reading.shards import Category, Manifest
from piip_scale.errors import DataError

_Pair = tuple[str, str]
"""Paths of an image and of its label map, each under its folder."""


def pack_label_maps(
    images: str | Path,
    label_maps: str | Path,
    out: str | Path,
    *,
    classes: Sequence[str],
    reduce_zero_label: bool = False,
    how: PackOptions | None = None,
) -> Manifest:
    """Packs images and their label maps, which have the same name but for the ending; see ``pack_items``.

    Files are stored as they are, ``KEY.jpg`` beside ``KEY.seg.png``. Every label map is held to the size of its image
    and to the classes.

    Args:
        images: The images, perhaps in folders.
        label_maps: Likewise the label maps: 8-bit PNG files whose pixels are class numbers, 255 being none.
        out: The folder to write.
        classes: Class names in label order.
        reduce_zero_label: 0 is no class either, and the classes count from 1.
        how: How shards are written.

    Raises:
        DataError: Something in the input is wrong, ``out`` holds another set, or it cannot be written.
    """
    images, label_maps = Path(images), Path(label_maps)
    _check_classes(classes)
    pairs = _pairs(images, label_maps)
    facts = SetFacts(
        "segmentation",
        tuple(Category(id=label, name=name) for label, name in enumerate(classes)),
        has_masks=False,
        options={"reduce_zero_label": reduce_zero_label},
        source={"images": images.name, "label_maps": label_maps.name},
        reduce_zero_label=reduce_zero_label,
    )
    rule = MapRule(len(classes), reduce_zero_label)
    return pack_items(list(_items(images, label_maps, pairs, rule)), Path(out), facts, how or PackOptions())


def _check_classes(classes: Sequence[str]) -> None:
    if not classes or len(set(classes)) != len(classes) or len(classes) > MAX_CLASSES:
        raise DataError(
            "classes of label maps",
            value=len(classes),
            rule=f"1 to {MAX_CLASSES} different names",
            fix="give --class-names, or --class",
        )


def _pairs(images: Path, label_maps: Path) -> list[_Pair]:
    for folder in (images, label_maps):
        if not folder.is_dir():
            raise DataError("folder not found", value=str(folder), rule="images and label maps lie in one folder each")
    maps = {Path(file).with_suffix("").as_posix(): file for file in images_under(label_maps)}
    photos = {Path(file).with_suffix("").as_posix(): file for file in images_under(images)}
    if alone := sorted(maps.keys() ^ photos.keys()):
        what = "label map" if alone[0] in photos else "image"
        raise DataError(
            f"{len(alone)} images or label maps are alone",
            value=alone[0],
            rule=f"it has no {what}; both have the same name but for the ending",
        )
    if not photos:
        raise DataError("images of the set", value=str(images), rule="there must be images")
    return [(photos[stem], maps[stem]) for stem in sorted(photos)]


def _items(images: Path, label_maps: Path, pairs: Sequence[_Pair], rule: MapRule) -> Iterator[PackItem]:
    paths, map_paths = [images / file for file, _ in pairs], [label_maps / file for _, file in pairs]
    sizes, map_sizes = file_sizes(paths), file_sizes(map_paths)
    # As with classes: ADE20K's files are sorted by scene.
    for number in mixed([file for file, _ in pairs]):
        notes = json_bytes({"image_id": number, "file_name": pairs[number][0]})
        label_map = LabelMap(map_paths[number], map_sizes[number], rule)
        yield PackItem(number, paths[number], None, sizes[number], 1, notes, label_map=label_map)
