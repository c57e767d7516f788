"""``piip-scale predict``: from weights to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from piip_scale.cli.options import ConfigPath, Overrides, WeightsPath
from piip_scale.errors import DataError
from piip_scale.text import printable


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(predict)


def predict(
    config: ConfigPath,
    weights: WeightsPath,
    images: Annotated[list[Path], typer.Argument(help="Photographs; several are tiled into one picture.")],
    out: Annotated[Path, typer.Option(help="The picture to write (.png).")] = Path("detections.png"),
    score_threshold: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Draw what scores at least this; default: 0.5 for objects, 0 for the five best classes.",
        ),
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all that was found there, as JSON.")] = None,
    exif: Annotated[
        Literal["apply", "stored"],
        typer.Option(help="Turn photographs as their EXIF data say, or not."),
    ] = "apply",
    max_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Refuse photographs of more; default: data.max_pixels."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Find objects in photographs, or the classes of photographs, and draw them.

    Example: `piip-scale predict runs/mine/config.py mine.safetensors photo.jpg --out photo.png`
    """
    from piip_scale.cli.prediction import predict_and_draw
    from piip_scale.config import load_config

    if out.suffix.lower() != ".png":
        raise DataError("--out", value=str(out), rule="pictures are written as .png")
    run = load_config(config, overrides or [])
    found = predict_and_draw(run, weights, images, out, score_threshold, json_out, exif=exif, max_pixels=max_pixels)
    for path, summary in zip(images, found, strict=True):
        typer.echo(printable(f"{path}: {summary}"))
    typer.echo(printable(f"picture: {out}"))
