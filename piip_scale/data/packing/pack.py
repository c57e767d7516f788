"""COCO and Pascal VOC to shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict, Unpack

from piip_scale.data.packing.coco import CocoImage, CocoSet, read_coco
from piip_scale.data.packing.door import stored_name
from piip_scale.data.packing.pack_plan import PackItem
from piip_scale.data.packing.packing import PackOptions, PackSource, SetFacts, pack_items
from piip_scale.data.packing.voc import read_voc
from piip_scale.data.reading.files import json_bytes, sha256_of_file
from piip_scale.data.reading.manifest import Category, Manifest
from piip_scale.data.reading.targets import Counts, annotation_counts, trainable_categories


def pack_coco(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    classes: Sequence[str] = (),
    subset: bool = False,
    drop_unused: bool = False,
    clip_boxes: bool = False,
    boxes_only: bool = False,
    how: PackOptions | None = None,
    **options: Any,
) -> Manifest:
    """Packs a COCO set into shards; every image is decoded once to know that it is whole.

    A complete set of the same input in ``out`` is reused, an unfinished one is finished.

    Args:
        annotations: The COCO JSON.
        images: The folder its ``file_name`` entries are relative to.
        out: The folder to write.
        classes: Category names in the label order wanted; empty takes the file's, by id.
        subset: ``classes`` are some of the file's; annotations of others are left out.
        drop_unused: Leave out classes that no annotation has.
        clip_boxes: Clip boxes that stick out of their image and drop those of which nothing is left.
        boxes_only: Leave masks out.
        how: How shards are written.
        **options: Fields of ``PackOptions`` that replace those of ``how``.

    Raises:
        DataError: Something in the input is wrong, ``out`` holds another set, or it cannot be written.
    """
    how = replace(how or PackOptions(), **options)
    source = coco_source(
        Path(annotations),
        Path(images),
        classes=classes,
        subset=subset,
        drop_unused=drop_unused,
        clip_boxes=clip_boxes,
        boxes_only=boxes_only,
        how=how,
    )
    return pack_items(source.items, Path(out), source.facts, how, source.problems)


class CocoChoice(TypedDict, total=False):
    """What is taken of a COCO set; see ``pack_coco``."""

    classes: Sequence[str]
    subset: bool
    drop_unused: bool
    clip_boxes: bool
    boxes_only: bool


def coco_source(annotations: Path, images: Path, *, how: PackOptions, **choice: Unpack[CocoChoice]) -> PackSource:
    """A COCO set as it would be packed; arguments as of ``pack_coco``.

    Raises:
        DataError: What keeps the whole file from being read.
    """
    problems = how.problems()
    found = read_coco(annotations, images, exif=how.exif, max_pixels=how.max_pixels, problems=problems, **choice)
    source = {"annotations": stored_name(annotations.name), "annotations_sha256": sha256_of_file(annotations)}
    # The parsed annotations of a large set take gigabytes: they end here, before processes are forked.
    return PackSource(
        _facts(found, _asked(choice, "clip_boxes", "boxes_only"), source), _items(found, images), problems
    )


def pack_voc(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    names: Path | None = None,
    instance_maps: Path | None = None,
    classes: Sequence[str] = (),
    subset: bool = False,
    clip_boxes: bool = False,
    how: PackOptions | None = None,
) -> Manifest:
    """Packs a Pascal VOC set into shards for detection; see ``read_voc`` and ``pack_items``.

    Args:
        annotations: The folder of XML files.
        images: The folder of images of the same names.
        out: The folder to write.
        names: A text file of the names to take; all where ``None``.
        instance_maps: The folder of maps of instances; without, there are boxes only.
        classes: Names in the label order wanted; empty takes those that occur, sorted.
        subset: ``classes`` are some of those that occur; objects of others are left out.
        clip_boxes: Clip boxes that stick out of their image and drop those of which nothing is left.
        how: How shards are written.

    Raises:
        DataError: Something in the input is wrong, ``out`` holds another set, or it cannot be written.
    """
    how = how or PackOptions()
    source = voc_source(
        Path(annotations),
        Path(images),
        names=names,
        instance_maps=instance_maps,
        classes=classes,
        subset=subset,
        clip_boxes=clip_boxes,
        how=how,
    )
    return pack_items(source.items, Path(out), source.facts, how, source.problems)


class VocChoice(TypedDict, total=False):
    """What is taken of a Pascal VOC set; see ``pack_voc``."""

    names: Path | None
    instance_maps: Path | None
    classes: Sequence[str]
    subset: bool
    clip_boxes: bool


def voc_source(annotations: Path, images: Path, *, how: PackOptions, **choice: Unpack[VocChoice]) -> PackSource:
    """A Pascal VOC set as it would be packed; arguments as of ``pack_voc``.

    Raises:
        DataError: What keeps the whole set from being read.
    """
    problems = how.problems()
    found = read_voc(annotations, images, exif=how.exif, max_pixels=how.max_pixels, problems=problems, **choice)
    names = choice.get("names")
    source = {
        "annotations": stored_name(annotations.name),
        "names": stored_name(names.name) if names is not None else None,
    }
    return PackSource(_facts(found, _asked(choice, "clip_boxes"), source), _items(found, images), problems)


def _asked(choice: Mapping[str, Any], *always: str) -> dict[str, Any]:
    """What a manifest keeps of a choice: sets packed before there were the other flags stay the same."""
    kept = {key: bool(choice.get(key)) for key in always} | {"classes": list(choice.get("classes", ()))}
    return kept | {key: True for key in ("subset", "drop_unused") if choice.get(key)}


def _facts(found: CocoSet, options: dict[str, Any], source: dict[str, Any]) -> SetFacts:
    return SetFacts(
        "detection",
        tuple(Category(**category) for category in found.categories),
        found.has_masks,
        options,
        source | {"num_clipped": found.num_clipped, "num_dropped": found.num_dropped, **found.num_other},
        _counts(found),
        undecided=found.undecided,
    )


def _counts(found: CocoSet) -> Counts:
    label_of_category = {category["id"]: label for label, category in enumerate(found.categories)}
    return annotation_counts((note for image in found.images for note in image.annotations), label_of_category)


def _items(found: CocoSet, images: Path) -> list[PackItem]:
    return [_item(image, images) for image in found.images]


def _item(image: CocoImage, images: Path) -> PackItem:
    notes = {
        "image_id": image.image_id,
        "file_name": stored_name(image.file_name),
        "height": image.height_px,
        "width": image.width_px,
        "annotations": list(image.annotations),
    }
    return PackItem(
        image.image_id,
        images / image.file_name,
        (image.height_px, image.width_px),
        image.file_bytes,
        len(image.annotations),
        json_bytes(notes),
        category_ids=trainable_categories(image.annotations),
    )
