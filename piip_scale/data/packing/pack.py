"""COCO and Pascal VOC to shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from piip_scale.data.packing.coco import CocoImage, CocoSet, read_coco
from piip_scale.data.packing.pack_plan import PackItem
from piip_scale.data.packing.packing import PackOptions, Progress, SetFacts, pack_items
from piip_scale.data.packing.voc import read_voc
from piip_scale.data.reading.files import json_bytes, sha256_of_file
from piip_scale.data.reading.shards import Category, Manifest
from piip_scale.errors import DataError


def pack_coco(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    classes: Sequence[str] = (),
    target_mb: float = 256.0,
    target_samples: int | None = None,
    workers: int | None = None,
    clip_boxes: bool = False,
    boxes_only: bool = False,
    overwrite: bool = False,
    on_progress: Progress | None = None,
    jpeg_quality: int | None = None,
) -> Manifest:
    """Packs a COCO set into shards; every image is decoded once to know that it is whole.

    A complete set of the same input in ``out`` is reused, an unfinished one is finished.

    Args:
        annotations: The COCO JSON.
        images: The folder its ``file_name`` entries are relative to.
        out: The folder to write.
        classes: Category names in the label order wanted; empty takes the file's, by id.
        target_mb: As in ``PackOptions``, like those that follow it.
        target_samples: Most samples in a shard.
        workers: Processes; all cores where not given.
        clip_boxes: Clip boxes that stick out of their image and drop those of which nothing is left.
        boxes_only: Leave masks out.
        overwrite: Replace a set of another input.
        on_progress: Told after every image (one process) or shard (several).
        jpeg_quality: Compress images again with it where that makes them smaller.

    Raises:
        DataError: Something in the input is wrong, ``out`` holds another set, or it cannot be written.
    """
    annotations, images = Path(annotations), Path(images)
    how = PackOptions(target_mb, target_samples, workers, overwrite, on_progress, jpeg_quality)
    found = read_coco(annotations, images, classes=classes, clip_boxes=clip_boxes, boxes_only=boxes_only)
    options = {"clip_boxes": clip_boxes, "boxes_only": boxes_only, "classes": list(classes)}
    source = {"annotations": annotations.name, "annotations_sha256": sha256_of_file(annotations)}
    facts, items = _facts(found, options, source), _items(found, images)
    # The parsed annotations of a large set take gigabytes, which every process would be forked with.
    del found
    return pack_items(items, Path(out), facts, how)


def pack_voc(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    names: Path | None = None,
    instance_maps: Path | None = None,
    classes: Sequence[str] = (),
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
        clip_boxes: Clip boxes that stick out of their image and drop those of which nothing is left.
        how: How shards are written.

    Raises:
        DataError: Something in the input is wrong, ``out`` holds another set, or it cannot be written.
    """
    annotations, images = Path(annotations), Path(images)
    found = read_voc(
        annotations, images, names=names, instance_maps=instance_maps, classes=classes, clip_boxes=clip_boxes
    )
    options = {"clip_boxes": clip_boxes, "classes": list(classes)}
    source = {"annotations": annotations.name, "names": names.name if names is not None else None}
    return pack_items(_items(found, images), Path(out), _facts(found, options, source), how or PackOptions())


def _facts(found: CocoSet, options: dict[str, Any], source: dict[str, Any]) -> SetFacts:
    return SetFacts(
        "detection",
        tuple(Category(**category) for category in found.categories),
        found.has_masks,
        options,
        source | {"num_clipped": found.num_clipped, "num_dropped": found.num_dropped},
    )


def _items(found: CocoSet, images: Path) -> list[PackItem]:
    return [_item(image, images) for image in found.images]


def _item(image: CocoImage, images: Path) -> PackItem:
    notes = {
        "image_id": image.image_id,
        "file_name": image.file_name,
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
        _check_masks,
    )


def _check_masks(notes: bytes, name: str) -> None:
    if b'"counts"' not in notes:
        return
    for note in json.loads(notes)["annotations"]:
        if isinstance(note.get("segmentation"), dict):
            _check_run_lengths(note["segmentation"], f"annotation {note['id']} of image {name}")


def _check_run_lengths(segmentation: dict[str, object], name: str) -> None:
    from pycocotools import mask as coco_mask

    try:
        coco_mask.decode(segmentation)
    except (ValueError, TypeError) as error:
        raise DataError(f"mask of {name} cannot be decoded", value=str(error), fix="correct or remove it") from error
