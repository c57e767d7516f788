"""``piip-scale convert`` and ``predict``: from a checkpoint to weights and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from piip_scale.cli.options import ConfigPath, Overrides, WeightsPath
from piip_scale.cli.progress import progress_bar
from piip_scale.errors import DataError
from piip_scale.text import printable


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(convert)
    app.command()(predict)


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A run directory, its checkpoints/, or one of them; or a folder that DeepSpeed wrote."),
    ],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write; with --max-shard-gb a folder.")],
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the weights written.")] = "fp32",
    max_shard_gb: Annotated[float | None, typer.Option(help="Split into files of at most this size.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="The running averages of a run with train.ema_decay.")] = False,
) -> None:
    """Gather a sharded training checkpoint into safetensors.

    Reads one parameter at a time, so a checkpoint larger than the memory converts too; needs no GPU and no DeepSpeed
    processes.

    Example: `piip-scale convert runs/mine mine.safetensors`
    """
    from piip_scale.checkpoint.convert import convert as convert_checkpoint

    with progress_bar("converting") as on_progress:
        report = convert_checkpoint(
            checkpoint,
            out,
            dtype=dtype,
            max_shard_gb=max_shard_gb,
            overwrite=overwrite,
            averaged=ema,
            on_progress=on_progress,
        )
    typer.echo(
        f"{out}: step {report.step}, {report.num_parameters:,} parameters, {report.num_bytes / 1e6:.1f} MB "
        f"in {report.seconds:.1f} s"
    )
    for note in report.notes:
        typer.echo(note, err=True)


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
