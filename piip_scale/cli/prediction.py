"""Predicting single photographs and drawing what was found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from piip_scale.config import RunConfig

if TYPE_CHECKING:
    from piip_scale.tasks.base import Detections


def predict_and_draw(
    config: RunConfig,
    weights: Path,
    images: Sequence[Path],
    out: Path,
    min_score: float,
    json_out: Path | None = None,
) -> list[int]:
    """Draws the detections of photographs into one picture.

    Args:
        config: The run's config, with its classes.
        weights: A safetensors file.
        images: Photographs.
        out: The PNG to write.
        min_score: Detections below it are not drawn.
        json_out: Where to write all detections; ``None`` to keep them.

    Returns:
        The number of objects drawn in each photograph.

    Raises:
        PiipError: A photograph or the weights are absent, damaged, or do not fit.
    """
    from piip_scale.data.files import write_bytes
    from piip_scale.tasks.detection import class_names, load_detector
    from piip_scale.tasks.drawing import DrawingStyle, contact_sheet, draw_detections, png_bytes
    from piip_scale.tasks.prediction import predict_image, read_image

    classes, style = class_names(config), DrawingStyle(min_score=min_score)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    photos = [read_image(path) for path in images]
    model = load_detector(config, weights).to(device)
    found = [predict_image(model, config.data.augment, pixels, number) for number, pixels in enumerate(photos, 1)]
    pictures = [draw_detections(pixels, one, classes, style) for pixels, one in zip(photos, found, strict=True)]
    sheet = contact_sheet(pictures, ", ".join(path.name for path in images), style=style)
    write_bytes(out, png_bytes(sheet))
    if json_out is not None:
        entries = [_entry(path, one, classes) for path, one in zip(images, found, strict=True)]
        write_bytes(json_out, f"{json.dumps(entries, indent=1)}\n".encode())
    return [int((one.scores >= min_score).sum()) for one in found]


def _entry(path: Path, found: Detections, classes: Sequence[str]) -> dict[str, Any]:
    """One photograph's detections; boxes are left, top, right, bottom in its pixels."""
    objects = []
    for index, label in enumerate(found.labels.tolist()):
        entry = {
            "class": classes[label],
            "score": round(found.scores[index].item(), 4),
            "box_xyxy_px": [round(edge, 2) for edge in found.boxes_xyxy_px[index].tolist()],
        }
        if found.masks_rle is not None:
            entry["mask_rle"] = found.masks_rle[index]
        objects.append(entry)
    return {"image": str(path), "objects": objects}
