"""Images with label maps, as ADE20K has them, to shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from piip_scale.data.images import image_facts, read_file
from piip_scale.data.orientation import StatedSize
from piip_scale.data.packing.door import class_names, stored_name
from piip_scale.data.packing.image_views import StatedOf, views_of
from piip_scale.data.packing.pack_classes import mixed
from piip_scale.data.packing.pack_plan import LabelMap, PackItem
from piip_scale.data.packing.packing import PackOptions, PackSource, SetFacts, pack_items
from piip_scale.data.packing.problems import Problems
from piip_scale.data.packing.walking import file_sizes, images_under
from piip_scale.data.reading.files import json_bytes
from piip_scale.data.reading.label_maps import MAX_CLASSES
from piip_scale.data.reading.manifest import Category, Manifest, MapRule
from piip_scale.errors import DataError

_RULE = "both have the same name but for the ending"
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
    how = how or PackOptions()
    source = label_map_source(
        Path(images), Path(label_maps), classes=classes, reduce_zero_label=reduce_zero_label, how=how
    )
    return pack_items(source.items, Path(out), source.facts, how, source.problems)


def label_map_source(
    images: Path, label_maps: Path, *, classes: Sequence[str], reduce_zero_label: bool = False, how: PackOptions
) -> PackSource:
    """Images and label maps as they would be packed; arguments as of ``pack_label_maps``.

    Raises:
        DataError: What keeps the whole set from being read.
    """
    problems = how.problems()
    _check_classes(classes)
    names = class_names(classes, f"label maps in {label_maps}")
    pairs = _pairs(images, label_maps, problems)
    views = views_of(_stated(images, label_maps, pairs, how.max_pixels), how.exif, how.max_pixels, str(images))
    facts = SetFacts(
        "segmentation",
        tuple(Category(id=label, name=name) for label, name in enumerate(names)),
        has_masks=False,
        options={"reduce_zero_label": reduce_zero_label},
        source={"images": stored_name(images.name), "label_maps": stored_name(label_maps.name)},
        reduce_zero_label=reduce_zero_label,
        undecided=views.undecided,
    )
    rule = MapRule(len(names), reduce_zero_label)
    return PackSource(facts, list(_items(images, label_maps, pairs, rule, problems)), problems)


def _check_classes(classes: Sequence[str]) -> None:
    if not classes or len(set(classes)) != len(classes) or len(classes) > MAX_CLASSES:
        raise DataError(
            "classes of label maps",
            value=len(classes),
            rule=f"1 to {MAX_CLASSES} different names",
            fix="give --class-names, or --class",
        )


def _pairs(images: Path, label_maps: Path, problems: Problems) -> list[_Pair]:
    """Images and label maps that belong together; what is wrong with others goes to ``problems``."""
    for folder in (images, label_maps):
        if not folder.is_dir():
            raise DataError("folder not found", value=str(folder), rule="images and label maps lie in one folder each")
    photos = images_under(images, problems=problems)
    if not photos:
        raise DataError("images of the set", value=str(images), rule="there must be images")
    maps_of = _maps_by_photo(photos, images_under(label_maps, problems=problems), problems)
    for photo in (photo for photo in photos if photo not in maps_of):
        with problems.collected("image"):
            raise DataError(f"image {photo} has no label map", rule=_RULE)
    return [(photo, maps_of[photo]) for photo in sorted(photos, key=_stem) if maps_of.get(photo)]


def _maps_by_photo(photos: Sequence[str], maps: Sequence[str], problems: Problems) -> dict[str, str]:
    """The label map of each image: ``a.jpg.png`` is of ``a.jpg`` alone, ``a.png`` of the one image called ``a``.

    Images that several maps or that maps of several images could mean have an empty one.
    """
    of_stem, whole_names, own = defaultdict(list), set(photos), set(maps)
    for photo in photos:
        of_stem[_stem(photo)].append(photo)
    found: dict[str, list[str]] = defaultdict(list)
    for label_map in maps:
        stem = _stem(label_map)
        meant = [stem] if stem in whole_names else [photo for photo in of_stem[stem] if f"{photo}.png" not in own]
        for photo in meant:
            found[photo].append(label_map)
        if not meant:
            with problems.collected("file"):
                raise DataError(f"label map {label_map} has no image", rule=_RULE)
        if len(meant) > 1:
            with problems.collected("image"):
                raise DataError(
                    f"images {', '.join(meant)} have one label map, {label_map}",
                    rule="each image has its own",
                    fix=f"name maps by the whole name, as in {meant[0]}.png, or remove what is not meant",
                )
            found |= {photo: ["", ""] for photo in meant}
    for photo, several in found.items():
        if len(several) > 1 and all(several):
            with problems.collected("image"):
                raise DataError(
                    f"image {photo} has the label maps {', '.join(several)}", rule="it has one", fix="remove the others"
                )
    return {photo: several[0] if len(several) == 1 else "" for photo, several in found.items()}


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _stated(images: Path, label_maps: Path, pairs: Sequence[_Pair], max_pixels: int) -> Iterator[tuple[Path, StatedOf]]:
    """Images, and the sizes of their label maps, which are drawn on one view of them."""

    def size_of(path: Path) -> StatedSize:
        return image_facts(read_file(path), str(path), max_pixels=max_pixels).stored_size_px

    return ((images / photo, partial(size_of, label_maps / label_map)) for photo, label_map in pairs)


def _items(
    images: Path, label_maps: Path, pairs: Sequence[_Pair], rule: MapRule, problems: Problems
) -> Iterator[PackItem]:
    paths, map_paths = [images / file for file, _ in pairs], [label_maps / file for _, file in pairs]
    sizes, map_sizes = file_sizes(paths, problems), file_sizes(map_paths, problems)
    # As with classes: ADE20K's files are sorted by scene.
    for number in mixed([file for file, _ in pairs]):
        size, map_size = sizes[number], map_sizes[number]
        if size is not None and map_size is not None:
            notes = json_bytes({"image_id": number, "file_name": stored_name(pairs[number][0])})
            label_map = LabelMap(map_paths[number], map_size, rule)
            yield PackItem(number, paths[number], None, size, 1, notes, label_map=label_map)
