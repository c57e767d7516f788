"""What a packed set holds, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from piip_scale.data.files import write_bytes
from piip_scale.data.sample import decode_image, parse_notes
from piip_scale.tasks.base import Detections

if TYPE_CHECKING:
    from rich.table import Table

    from piip_scale.data.shards import ShardSet
    from piip_scale.data.summary import SetSummary

_COLUMNS = 4


def summary_table(folder: Path, summary: SetSummary) -> Table:
    """A set's numbers, one row each."""
    from rich.table import Table

    low, middle, high = summary.short_edges_px
    table = Table(title=str(folder), show_header=False)
    table.add_row("images", f"{summary.num_images}, {summary.num_empty_images} without objects")
    table.add_row("short edge", f"{low} to {high} px, median {middle}")
    table.add_row("long edge", "{} to {} px, median {}".format(*(summary.long_edges_px[i] for i in (0, 2, 1))))
    table.add_row("objects an image", "median {}, most {}".format(*summary.objects_per_image))
    table.add_row("objects by size", ", ".join(f"{count} {name}" for name, count in summary.objects_of_size.items()))
    table.add_row("crowd regions", str(summary.num_crowds))
    for name, count in summary.objects_of_class.items():
        table.add_row(f"class {name}", str(count))
    return table


def draw_contact_sheet(shards: ShardSet, out: Path, num_images: int) -> None:
    """Draws samples spread evenly over a set, with their boxes and masks, into one PNG.

    Raises:
        DataError: A sample is damaged, or the picture cannot be written.
    """
    from piip_scale.tasks.drawing import DrawingStyle, contact_sheet, draw_detections, png_bytes

    style = DrawingStyle(long_edge_px=360, text_px=12, scores=False)
    numbers = np.unique(np.linspace(0, len(shards) - 1, min(num_images, len(shards))).round().astype(int)).tolist()
    pictures = []
    for number in numbers:
        sample = shards.read(number)
        pixels = decode_image(sample.image, sample.key)
        pictures.append(draw_detections(pixels, _ground_truth(parse_notes(sample), shards), shards.classes, style))
    caption = f"{len(numbers)} of {len(shards)} images: " + ", ".join(shards.keys[numbers])
    write_bytes(out, png_bytes(contact_sheet(pictures, caption, _COLUMNS, style)))


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
