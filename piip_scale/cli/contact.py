"""What a packed set holds, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from piip_scale.data.packing.label_maps import decode_mapped
from piip_scale.data.reading.files import write_bytes
from piip_scale.data.sample import decode_image, decode_labelled, parse_notes
from piip_scale.tasks.base import Detections

if TYPE_CHECKING:
    import PIL.Image
    from rich.table import Table

    from piip_scale.data.reading.shards import ShardSet
    from piip_scale.tasks.drawing import DrawingStyle

_COLUMNS = 4
_MOST_CLASSES = 40
"""A set of more classes is told by its rarest and its most frequent one."""


def summary_table(shards: ShardSet) -> Table:
    """A set's numbers, one row each.

    Raises:
        DataError: A shard is gone or its annotations are damaged.
    """
    tables = {"classification": _label_table, "segmentation": _map_table, "detection": _object_table}
    return tables[shards.manifest.kind](shards)


def _map_table(shards: ShardSet) -> Table:
    from piip_scale.data.packing.summary import summarise_maps

    summary = summarise_maps(shards)
    table = _table(shards.location, str(summary.num_images), summary.short_edges_px, summary.long_edges_px)
    shares = summary.share_of_class.items()
    shown = shares if len(shares) <= _MOST_CLASSES else sorted(shares, key=lambda item: -item[1])[:_MOST_CLASSES]
    table.add_row("classes", str(len(shares)) + (f", the largest {len(shown)}:" if len(shown) < len(shares) else ""))
    for name, share in shown:
        table.add_row(f"class {name}", f"{share:.2%} of the pixels")
    table.add_row("no class", f"{summary.ignored_share:.2%} of the pixels")
    return table


def _label_table(shards: ShardSet) -> Table:
    from piip_scale.data.packing.summary import summarise_labels

    summary = summarise_labels(shards)
    table = _table(shards.location, str(summary.num_images), summary.short_edges_px, summary.long_edges_px)
    counts = sorted(summary.images_of_class.items(), key=lambda item: item[1])
    (rarest, fewest), (middle, (frequent, most)) = counts[0], (counts[len(counts) // 2][1], counts[-1])
    table.add_row("classes", str(len(counts)))
    table.add_row("images a class", f"{fewest} ({rarest}) to {most} ({frequent}), median {middle}")
    for name, count in summary.images_of_class.items() if len(counts) <= _MOST_CLASSES else ():
        table.add_row(f"class {name}", str(count))
    return table


def _table(location: str, images: str, short_px: tuple[int, int, int], long_px: tuple[int, int, int]) -> Table:
    from rich.table import Table

    table = Table(title=location, show_header=False)
    table.add_row("images", images)
    for name, (low, middle, high) in (("short edge", short_px), ("long edge", long_px)):
        table.add_row(name, f"{low} to {high} px, median {middle}")
    return table


def _object_table(shards: ShardSet) -> Table:
    from piip_scale.data.packing.summary import summarise

    summary = summarise(shards)
    images = f"{summary.num_images}, {summary.num_empty_images} without objects"
    table = _table(shards.location, images, summary.short_edges_px, summary.long_edges_px)
    table.add_row("objects an image", "median {}, most {}".format(*summary.objects_per_image))
    table.add_row("objects by size", ", ".join(f"{count} {name}" for name, count in summary.objects_of_size.items()))
    table.add_row("crowd regions", str(summary.num_crowds))
    for name, count in summary.objects_of_class.items():
        table.add_row(f"class {name}", str(count))
    return table


def draw_contact_sheet(shards: ShardSet, out: Path, num_images: int) -> None:
    """Draws samples spread evenly over a set, with their boxes and masks, label map or class, into one PNG.

    Raises:
        DataError: A sample is damaged, or the picture cannot be written.
    """
    from piip_scale.tasks.drawing import DrawingStyle, contact_sheet, png_bytes

    style = DrawingStyle(long_edge_px=360, text_px=12, scores=False, names_once=True)
    numbers = np.unique(np.linspace(0, len(shards) - 1, min(num_images, len(shards))).round().astype(int)).tolist()
    pictures = [_picture(shards, number, style) for number in numbers]
    caption = f"{len(numbers)} of {len(shards)} images: " + ", ".join(shards.keys[numbers])
    write_bytes(out, png_bytes(contact_sheet(pictures, caption, _COLUMNS, style)))


def _picture(shards: ShardSet, number: int, style: DrawingStyle) -> PIL.Image.Image:
    from piip_scale.tasks.drawing import draw_detections, draw_label_map, draw_names, draw_regions

    raw = shards.read(number)
    if shards.manifest.kind == "classification":
        labelled = decode_labelled(raw, len(shards.classes))
        return draw_names(labelled.pixels, [(labelled.label, shards.classes[labelled.label])], style)
    if shards.manifest.kind == "segmentation":
        mapped = decode_mapped(raw, shards.map_rule)
        return draw_label_map(mapped.pixels, mapped.labels, shards.classes, style)
    pixels = decode_image(raw.image, raw.key)
    notes = parse_notes(raw)
    picture = draw_detections(pixels, _ground_truth(notes, shards), shards.classes, style)
    crowds = [note["bbox"] for note in notes["annotations"] if note["iscrowd"]]
    corners = [(x, y, x + width, y + height) for x, y, width, height in crowds]
    draw_regions(picture, corners, style.long_edge_px / max(pixels.shape[:2]))
    return picture


def _ground_truth(notes: dict[str, Any], shards: ShardSet) -> Detections:
    """A sample's objects in the shape of detections."""
    objects = [note for note in notes["annotations"] if not note["iscrowd"]]
    boxes = torch.tensor([note["bbox"] for note in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    size = notes["height"], notes["width"]
    masks = [_run_lengths(note["segmentation"], *size) for note in objects] if shards.manifest.has_masks else None
    labels = torch.tensor([shards.label_of_category[note["category_id"]] for note in objects], dtype=torch.long)
    return Detections(notes["image_id"], boxes, torch.ones(len(objects)), labels, masks)


def _run_lengths(segmentation: Any, height: int, width: int) -> dict[str, object]:
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, dict):
        return segmentation
    merged: dict[str, object] = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    return merged
