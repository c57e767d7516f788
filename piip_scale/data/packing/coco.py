"""COCO annotation files: read and checked against their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from piip_scale.data.images import MAX_PIXELS
from piip_scale.data.orientation import Exif, Undecided
from piip_scale.data.packing.coco_entries import read_categories, read_entries
from piip_scale.data.packing.coco_file import load_coco_json as load_coco_json
from piip_scale.data.packing.coco_file import split_coco as split_coco
from piip_scale.data.packing.coco_notes import NoteChecker
from piip_scale.data.packing.door import whole_number
from piip_scale.data.packing.finding import ImageFolder
from piip_scale.data.packing.problems import Problems
from piip_scale.errors import DataError
from piip_scale.logging import get_logger


@dataclass(frozen=True, slots=True)
class CocoImage:
    """One image of a set and its checked annotations.

    Attributes:
        file_name: Under the folder of images, as it is on disk.
        annotations: COCO dicts with ``id, category_id, bbox, area, iscrowd`` and, where there is a mask,
            ``segmentation``; what is to be ignored has an ``iscrowd`` of 1.
    """

    image_id: int
    file_name: str
    height_px: int
    width_px: int
    file_bytes: int
    annotations: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class CocoSet:
    """A checked set.

    Attributes:
        images: In the file's order.
        categories: ``{"id", "name"}`` in label order.
        has_masks: Every annotation has a segmentation.
        num_clipped: Boxes that stuck out and were clipped.
        num_dropped: Boxes of which nothing was left (only with ``clip_boxes``).
        num_other: Of what else was done to annotations and images, how often.
        undecided: What becomes of an orientation in a file that no size decides.
    """

    images: tuple[CocoImage, ...]
    categories: tuple[dict[str, Any], ...]
    has_masks: bool
    num_clipped: int
    num_dropped: int
    num_other: Mapping[str, int] = field(default_factory=dict)
    undecided: Undecided | None = None


def read_coco(
    annotations: Path,
    images: Path,
    *,
    classes: Sequence[str] = (),
    subset: bool = False,
    drop_unused: bool = False,
    clip_boxes: bool = False,
    boxes_only: bool = False,
    exif: Exif = "auto",
    max_pixels: int = MAX_PIXELS,
    problems: Problems | None = None,
) -> CocoSet:
    """Reads a COCO file and checks it against its image folder, without opening the images.

    Args:
        annotations: The COCO JSON, perhaps packed with gzip.
        images: The folder its ``file_name`` entries are relative to.
        classes: Category names in the label order wanted; empty takes the file's, by id.
        subset: ``classes`` are some of the file's; annotations of others are left out.
        drop_unused: Leave out classes that no annotation has.
        clip_boxes: Clip boxes that stick out by any amount and drop those of which nothing is left.
        boxes_only: Leave masks out.
        exif: What becomes of orientations in files.
        max_pixels: Images of more are refused.
        problems: Takes what is wrong; raised here where not given.

    Raises:
        DataError: What is wrong, or what keeps the whole file from being read.
    """
    gathered = problems if problems is not None else Problems()
    root = load_coco_json(annotations)
    if not images.is_dir():
        raise DataError(
            f"image folder {images} is not there", rule=f"it holds the images of {annotations}", fix="check the path"
        )
    categories = read_categories(root, annotations, classes, subset=subset, drop_unused=drop_unused)
    folder = ImageFolder(images)
    found = read_entries(root, annotations, folder, gathered, exif, max_pixels)
    entries = found.images
    checker = NoteChecker(annotations, categories, gathered, clip_boxes=clip_boxes, boxes_only=boxes_only)
    image_ids = {whole_number(image.get("id")) for image in root["images"]}
    by_image = checker.by_image(root["annotations"], entries, image_ids)
    has_masks = _has_masks(by_image, annotations, gathered)
    if problems is None:
        gathered.settle(str(annotations))
    made = tuple(
        CocoImage(entry.image_id, entry.name, *entry.size_px, entry.num_bytes, tuple(by_image[entry.image_id]))
        for entry in entries
    )
    _log(annotations, checker.report(), folder.num_respelled, found.num_sized, categories.unused)
    done = checker.done
    other = {f"num_{key}": done[key] for key in sorted(done) if done[key] and key not in ("clipped", "dropped")}
    other |= {"num_sized": found.num_sized} if found.num_sized else {}
    return CocoSet(made, categories.chosen, has_masks, done["clipped"], done["dropped"], other, found.undecided)


def _log(annotations: Path, done: str, num_respelled: int, num_sized: int, unused: Sequence[str]) -> None:
    logger = get_logger(__name__)
    if done:
        logger.warning("%s: %s", annotations, done)
    if num_respelled:
        logger.warning("%s: found %d images under another spelling of their names", annotations, num_respelled)
    if num_sized:
        logger.warning("%s: took the sizes of %d images from their files", annotations, num_sized)
    if unused:
        logger.warning("%s: left out categories of no annotation that share a name: %s", annotations, ", ".join(unused))


def _has_masks(by_image: dict[int, list[dict[str, Any]]], annotations: Path, problems: Problems) -> bool:
    """Whether all annotations have masks; leaves those without out where what is broken is skipped."""
    notes = [note for of_image in by_image.values() for note in of_image]
    without = [note["id"] for note in notes if "segmentation" not in note]
    if not without or len(without) == len(notes):
        return bool(notes) and not without
    with problems.collected("annotation"):
        raise DataError(
            f"annotation file {annotations} has masks for {len(notes) - len(without)} of {len(notes)} annotations",
            rule=f"all have one or none has; the first without is {without[0]}",
            fix="complete the masks, or leave them out with --boxes-only",
        )
    for of_image in by_image.values():
        of_image[:] = [note for note in of_image if "segmentation" in note]
    return True
