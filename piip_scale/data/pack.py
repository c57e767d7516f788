"""COCO to shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from piip_scale.data.coco import CocoImage, read_coco
from piip_scale.data.files import json_bytes, sha256_of_file
from piip_scale.data.packing import PackItem, PackOptions, Progress, SetFacts, pack_items
from piip_scale.data.shards import Category, Manifest
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
) -> Manifest:
    """Packs a COCO set into shards; every image is decoded once to know that it is whole.

    A complete set of the same input in ``out`` is reused, an unfinished one is finished.

    Args:
        annotations: The COCO JSON.
        images: The folder its ``file_name`` entries are relative to.
        out: The folder to write.
        classes: Category names in the label order wanted; empty takes the file's, by id.
        target_mb: Size of a shard, in millions of bytes.
        target_samples: Most samples in a shard.
        workers: Processes; all cores where not given.
        clip_boxes: Clip boxes that stick out of their image and drop those of which nothing is left.
        boxes_only: Leave masks out.
        overwrite: Replace a set of another input.
        on_progress: Told after every image (one process) or shard (several).

    Raises:
        DataError: Something in the input is wrong, ``out`` holds another set, or it cannot be written.
    """
    annotations, images, out = Path(annotations), Path(images), Path(out)
    how = PackOptions(target_mb, target_samples, workers, overwrite, on_progress)
    found = read_coco(annotations, images, classes=classes, clip_boxes=clip_boxes, boxes_only=boxes_only)
    facts = SetFacts(
        "detection",
        tuple(Category(**category) for category in found.categories),
        found.has_masks,
        options={"clip_boxes": clip_boxes, "boxes_only": boxes_only, "classes": list(classes)},
        source={
            "annotations": annotations.name,
            "annotations_sha256": sha256_of_file(annotations),
            "num_clipped": found.num_clipped,
            "num_dropped": found.num_dropped,
        },
    )
    items = [_item(image, images) for image in found.images]
    # The parsed annotations of a large set take gigabytes, which every process would be forked with.
    del found
    return pack_items(items, out, facts, how)


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
