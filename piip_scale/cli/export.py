"""``piip-scale export``: a trained model as a folder for others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from piip_scale.cli.options import Averages, Overrides, Step, TrainedPath, read_size
from piip_scale.errors import DataError
from piip_scale.text import printable

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    from piip_scale.serving.onnx_export import OnnxReport


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(export)


def export(
    config: TrainedPath,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[WEIGHTS] DIR", help="Weights, unless they are the newest checkpoint; then a new folder."
        ),
    ],
    metrics: Annotated[
        Path | None, typer.Option(help="What `evaluate --out` wrote, for the card; default: what the run measured.")
    ] = None,
    max_file_gb: Annotated[float, typer.Option(min=0.001, help="Split weights into files of at most this size.")] = 5.0,
    onnx: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Write model.onnx too, for one RGB image of this size; it is compared."),
    ] = None,
    step: Step = None,
    ema: Averages = False,
    overrides: Overrides = None,
) -> None:
    """Write a trained model as a folder in the layout of the Hugging Face hub.

    Weights, config, classes, preprocessing, and a model card with what was measured. The folder is taken wherever a run
    is, and by `piip_scale.load(DIR).predict("photo.jpg")`. Nothing of your machine gets into it.

    Example: `piip-scale export runs/mine mine`
    """
    from piip_scale.serving.exporting import export_model, measured_metrics
    from piip_scale.tasks.trained import find_trained

    if len(paths) > 2:
        raise DataError("export", value=str(paths[2]), rule="it takes a model, perhaps weights, and a new folder")
    found = find_trained(
        config, paths[0] if len(paths) == 2 else None, overrides=overrides or [], step=step, averaged=ema
    )
    if metrics is not None:
        measured = _read_metrics(metrics)
    else:
        keeps = found.config.train.ema_decay is not None
        measured = measured_metrics(config, found.step, averaged=ema, keeps_averages=keeps)
    size_px = None if onnx is None else read_size(onnx, option="--onnx")
    report = export_model(found, paths[-1], metrics=measured, max_file_gb=max_file_gb, onnx_size_px=size_px)
    with_metrics = f"{report.num_metrics} metrics" if report.num_metrics else "no metrics, since the run has none of it"
    typer.echo(
        printable(f"{paths[-1]}: {report.num_parameters:,} parameters, {with_metrics}; {', '.join(report.files)}")
    )
    if report.onnx is not None:
        typer.echo(_onnx_line(report.onnx))


def _onnx_line(onnx: OnnxReport) -> str:
    outputs = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in onnx.outputs.items())
    left_out = f"; {onnx.left_out}" if onnx.left_out else ""
    return (
        f"model.onnx: images to {outputs}{left_out}. Largest difference from torch {onnx.difference:.1e} of the "
        f"largest value; {1000 * onnx.seconds:.1f} ms an image, torch {1000 * onnx.eager_seconds:.1f} ms, "
        f"on {onnx.threads} thread(s)"
    )


def _read_metrics(path: Path) -> dict[str, float]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("--metrics", value=str(path), rule=f"it cannot be read ({error})") from None
    if not isinstance(values, dict) or not all(isinstance(value, int | float) for value in values.values()):
        raise DataError("--metrics", value=str(path), rule="names and numbers, as `evaluate --out` writes them")
    return values
