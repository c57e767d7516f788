"""Predicting single photographs and drawing what was found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from piip_scale.config import RunConfig
from piip_scale.data.orientation import Exif


def predict_and_draw(
    config: RunConfig,
    weights: Path,
    images: Sequence[Path],
    out: Path,
    min_score: float | None,
    json_out: Path | None = None,
    *,
    exif: Exif = "apply",
    max_pixels: int | None = None,
) -> list[str]:
    """Draws what a model finds in photographs into one picture.

    Args:
        config: The run's config, with its classes.
        weights: A safetensors file.
        images: Photographs.
        out: The PNG to write.
        min_score: What scores less is not drawn; ``None`` is 0.5 for objects, 0 for classes.
        json_out: Where to write all that was found; ``None`` to keep it.
        exif: What becomes of an orientation in a photograph.
        max_pixels: Refuse photographs of more; ``None`` takes the config's ``data.max_pixels``.

    Returns:
        A few words on each photograph.

    Raises:
        PiipError: A photograph or the weights are absent, damaged, or do not fit.
    """
    from piip_scale.data.images import read_photo
    from piip_scale.data.reading.files import write_bytes
    from piip_scale.engine.fp32_precision import apply_fp32_precision
    from piip_scale.tasks.drawing import contact_sheet, png_bytes
    from piip_scale.tasks.kinds import build_predictor, load_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    apply_fp32_precision(config.train)
    read = partial(read_photo, exif=exif, max_pixels=max_pixels or config.data.max_pixels)
    # Read twice: a damaged one is refused before any is predicted, and no more than one is in memory.
    for path in images:
        read(path)
    predictor = build_predictor(config, load_model(config, weights).to(device), min_score)
    found, pictures = [], []
    for number, path in enumerate(images, 1):
        pixels = read(path, quiet=True)
        found.append(predictor.predict(pixels, number))
        pictures.append(predictor.draw(pixels, found[-1]))
    write_bytes(out, png_bytes(contact_sheet(pictures, ", ".join(path.name for path in images))))
    if json_out is not None:
        entries = [{"image": str(path)} | predictor.entry(one) for path, one in zip(images, found, strict=True)]
        write_bytes(json_out, f"{json.dumps(entries, indent=1)}\n".encode())
    return [predictor.summary(one) for one in found]
